"""One training step: crops, teacher view, student view, filters, losses.

    draws = refiner.draw(batch_size, progress=0.3, generator=generator)    # everything random
    output = refiner(images, draws)                                        # nothing random
    output.loss.backward()

Student and teacher are one backbone: the teacher is the student with its adapter off. It comes
first, so that what it holds for a moment is gone before the student's graph is there.

Several processes that share a batch take a step together: every one the images and draws of its
part. Whatever couples images (mean and deviation of the inflow, sparsity level, counts of clean
tokens, whether there are any) is of the whole batch; the mean over the processes of a term, and of
a gradient, is that of one process with all the images.

Dimension key: B = images, K = crops of an image, Q = B * K crops, N = tokens of an image or crop,
S = tokens of the reference or its strip, R = registers, D = detectors, C = channels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbone import Backbone
from backbone.preprocess import normalize, resize_image
from backbone.registers import (
    LearnableBorder,
    Stripped,
    border_width,
    canvas_size,
    strip,
    surround,
)
from trainer.channels import unit_tokens
from trainer.config import Recipe
from trainer.crops import compose, crop_tokens, crop_views
from trainer.distributed import ALONE, Ranks
from trainer.draws import StepDraws, draw_step
from trainer.filters import max_cosine_scores
from trainer.lora import Adapter
from trainer.losses import consistency_loss, match_targets
from trainer.objective import (
    Comparisons,
    StudentView,
    TeacherView,
    choose_candidates,
    find_clean,
    sum_losses,
)


class StepOutput(NamedTuple):
    """`loss` with its graph; `terms` without: losses, sparsity level, shares of clean tokens."""

    loss: Tensor
    terms: dict[str, Tensor]


class Scale(NamedTuple):
    """What follows from the side of the images: grid, width of the border and of the consistency
    target's in patches, canvas in pixels, register tokens of an image."""

    size: int
    grid: tuple[int, int]
    width: int
    wide: int
    canvas: tuple[int, int]
    num_registers: int


class Refiner(nn.Module):
    """The method over a backbone with an adapter. What trains is in `parameters()`.

    Args:
        backbone: With the adapter in it.
        adapter: Switches between student and teacher.
        recipe: Its sections `registers`, `crops`, `filters` and `loss` are used.
        size: Side of the square images in pixels; a step may have another of `data.other_sizes`.
        reference_3SS: The reference image, uint8, at that size.
        channels: Channels masked before every normalisation.
        bf16: Run the backbone in bfloat16; filters and losses never are.
        ranks: Processes that share a batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        recipe: Recipe,
        *,
        size: int,
        reference_3SS: Tensor,
        channels: Sequence[int] = (),
        bf16: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.backbone = backbone
        self._adapter = adapter
        self._crops, self._filters, self._loss = recipe.crops, recipe.filters, recipe.loss
        self._registers = registers = recipe.registers
        self._bf16 = bf16
        scale = self._scale(size)
        self.size, self.grid, self.width, self.canvas = size, scale.grid, scale.width, scale.canvas
        hijack = recipe.filters.attention_hijack
        self._layers = hijack.layer_range(backbone.depth) if hijack.enabled else range(0)
        self.border = (
            LearnableBorder(self.canvas, self.width, backbone.patch_size)
            if registers.fill == "learnable"
            else None
        )
        mask = torch.tensor(list(channels), dtype=torch.int64) if channels else None
        self.register_buffer("channels", mask, persistent=False)
        self.channels: Tensor | None
        self.register_buffer("reference_3SS", reference_3SS, persistent=False)
        self.reference_3SS: Tensor
        self._references: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.reference_3SS.device

    @property
    def num_registers(self) -> int:
        """Register tokens of an image of the size `size`, R."""
        return self._scale(self.size).num_registers

    def _scale(self, size: int) -> Scale:
        grid = h, w = self.backbone.grid(size, size)
        width = border_width(grid, self._registers.r_reg, self._registers.rounding)
        canvas = canvas_size((size, size), width, self.backbone.patch_size)
        num_registers = (h + 2 * width) * (w + 2 * width) - h * w
        wide = max(width, self._loss.consistency_width)
        return Scale(size, grid, width, wide, canvas, num_registers)

    def train(self, mode: bool = True) -> "Refiner":
        """Switch the adapter's dropout; the backbone stays in evaluation mode."""
        super().train(mode)
        self._adapter.train_dropout(mode)
        return self

    def draw(
        self,
        batch: int,
        *,
        progress: float,
        generator: torch.Generator,
        size: int | None = None,
    ) -> StepDraws:
        """Draw the random choices of a step for `batch` images of this process, see `draw_step`."""
        consistent = self._loss.lambda_con > 0 and progress >= self._loss.consistency_start
        whole, scale = batch * self.ranks.size, self._scale(size or self.size)
        patch = self.backbone.patch_size
        return draw_step(
            whole,
            generator,
            part=self.ranks.part(whole),
            crops=self._crops,
            fill=self._registers.fill,
            detector_share=self._filters.register_guided.detector_share,
            num_registers=scale.num_registers,
            size=scale.size,
            margin=scale.width * patch,
            consistency_margin=scale.wide * patch if consistent else None,
        )

    def forward(self, images_B3SS: Tensor, draws: StepDraws) -> StepOutput:
        """The loss of a batch: a pure function of weights, images and draws (of all processes).

        Args:
            images_B3SS: uint8, on the module's device.
            draws: Of `draw`.
        """
        backbone = self.backbone
        pixels_B3SS = normalize(images_B3SS, mean=backbone.mean, std=backbone.std)
        with _seeded(draws.dropout_seed):
            teacher, relations_QNC = self._without_gradient(pixels_B3SS, draws)
            student = self._student_view(pixels_B3SS, draws)

        targets_QNC = teacher.crop_QNC
        if self._loss.matched:
            targets_QNC = match_targets(teacher.crop_QNC, teacher.full_BNC)
        clean_QN, shares = find_clean(
            targets_QNC, student, teacher, draws, self._filters, self.ranks
        )
        share = self._filters.fp_gp.candidate_share
        candidates_QPC = choose_candidates(teacher, draws, share=share)
        loss, terms = sum_losses(
            student, teacher, targets_QNC, clean_QN, candidates_QPC, self._loss, self.ranks
        )
        if relations_QNC is not None:
            consistency = consistency_loss(
                student.crop_QNC, relations_QNC, temperature=self._loss.temperature
            )
            loss = loss + self._loss.lambda_con * consistency
            terms["consistency"] = consistency
        terms = {"loss": loss, **terms, **shares}
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})

    def _student_view(self, pixels_B3SS: Tensor, draws: StepDraws) -> StudentView:
        scale = self._scale(pixels_B3SS.shape[-1])
        stripped = self._encode_surrounded(pixels_B3SS, draws.border, scale.width)
        image_BNC = unit_tokens(stripped.image, self.channels)
        crop_QNC = unit_tokens(crop_tokens(image_BNC, draws.boxes_BK4, scale.grid))
        return StudentView(image_BNC, unit_tokens(stripped.registers, self.channels), crop_QNC)

    @torch.no_grad()
    def _without_gradient(
        self, pixels_B3SS: Tensor, draws: StepDraws
    ) -> tuple[TeacherView, Tensor | None]:
        """The teacher's view, and the target of spatial consistency if it has started."""
        views_Q3SS = crop_views(pixels_B3SS, draws.boxes_BK4)
        teacher = self._teacher_view(pixels_B3SS, views_Q3SS, draws)
        return teacher, self._consistency_target(views_Q3SS, draws)

    def _consistency_target(self, views_Q3SS: Tensor, draws: StepDraws) -> Tensor | None:
        if not draws.with_consistency:
            return None
        wide = self._scale(views_Q3SS.shape[-1]).wide
        stripped = self._encode_surrounded(views_Q3SS, draws.consistency_border, wide)
        return unit_tokens(stripped.image, self.channels)

    def _teacher_view(
        self, pixels_B3SS: Tensor, views_Q3SS: Tensor, draws: StepDraws
    ) -> TeacherView:
        reference_13SS, reference_1SC = self.reference(pixels_B3SS.shape[-1])
        composite = compose(
            views_Q3SS,
            reference_13SS,
            side=draws.side,
            share=self._crops.strip_share,
            patch_size=self.backbone.patch_size,
        )
        with self._adapter.off():
            full_BNC = self._unit_features(pixels_B3SS)
            with self.backbone.tap_attention(self._layers) as tapped:
                tokens_QTC = self._unit_features(composite.pixels)
        crop_N = composite.is_crop.nonzero().flatten()
        crop_QNC, strip_QSC = tokens_QTC[:, crop_N], tokens_QTC[:, ~composite.is_crop]
        scores = Comparisons(
            reference_QN=max_cosine_scores(crop_QNC, reference_1SC),
            strip_QN=max_cosine_scores(crop_QNC, strip_QSC),
        )
        # The packed projections have values and the strip too: twice what the filter needs.
        place_N = crop_N + self.backbone.num_prefix_tokens
        taps = [
            (q.index_select(2, place_N), k.index_select(2, place_N))
            for q, k in (tapped[layer] for layer in self._layers)
        ]
        return TeacherView(full_BNC, crop_QNC, scores, taps)

    @torch.no_grad()
    def reference(self, size: int) -> tuple[Tensor, Tensor]:
        """The reference image, normalised [1, 3, S, S], and the teacher's unit tokens of it; made
        once for every size."""
        if size not in self._references:
            image_3SS = resize_image(self.reference_3SS, (size, size))
            mean, std = self.backbone.mean, self.backbone.std
            pixels_13SS = normalize(image_3SS[None], mean=mean, std=std)
            with self._adapter.off():
                self._references[size] = pixels_13SS, self._unit_features(pixels_13SS)
        return self._references[size]

    def _encode_surrounded(
        self, pixels_X3SS: Tensor, border: Tensor | None, width: int
    ) -> Stripped:
        patch, size = self.backbone.patch_size, pixels_X3SS.shape[-1]
        if border is None:
            assert self.border is not None  # drawn otherwise
            border = self.border(canvas_size((size, size), width, patch), width)
        border = border.to(pixels_X3SS.device, non_blocking=True)
        canvas = surround(pixels_X3SS, border, width=width, patch_size=patch)
        return strip(self._features(canvas), self.backbone.grid(size, size), width)

    def _unit_features(self, pixels: Tensor) -> Tensor:
        return unit_tokens(self._features(pixels), self.channels)

    def _features(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self.backbone.encode(pixels).tokens


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator, where dropout gets its seeds, seeded inside; after, as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
