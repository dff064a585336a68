"""One training step: crops, student view, teacher view, filters, losses.

    draws = refiner.draw(batch_size, progress=0.3, generator=generator)    # everything random
    output = refiner(images, draws)                                        # nothing random
    output.loss.backward()

Student and teacher are one backbone: the teacher is the student with its adapter off.

Dimension key: B = images, K = crops of an image, Q = B * K crops, N = tokens of an image or crop,
S = tokens of the reference or its strip, R = registers, D = detectors, C = channels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbone import Backbone
from backbone.preprocess import normalize
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
from trainer.draws import StepDraws, draw_step
from trainer.filters import (
    attention_hijack,
    below_threshold,
    crop_inflow,
    max_cosine_scores,
    register_guided,
    sample_candidates,
)
from trainer.lora import Adapter
from trainer.losses import (
    absorption_loss,
    consistency_loss,
    match_targets,
    refinement_loss,
    register_uniformity_loss,
    sparsity_level,
)


class StepOutput(NamedTuple):
    """`loss` with its graph; `terms` without: losses, sparsity level, shares of clean tokens."""

    loss: Tensor
    terms: dict[str, Tensor]


class StudentView(NamedTuple):
    """Unit tokens with gradient."""

    image_BNC: Tensor
    registers_BRC: Tensor
    crop_QNC: Tensor


class TeacherView(NamedTuple):
    """Unit tokens without gradient, and the composites' attention."""

    crop_QNC: Tensor
    strip_QSC: Tensor
    full_BNC: Tensor
    taps: list[tuple[Tensor, Tensor]]
    crop_index_N: Tensor


class Comparisons(NamedTuple):
    """Likeness of the teacher's crop tokens to the reference image and to the strip."""

    reference_QN: Tensor
    strip_QN: Tensor


class Refiner(nn.Module):
    """The method over a backbone with an adapter. What trains is in `parameters()`.

    Args:
        backbone: With the adapter in it.
        adapter: Switches between student and teacher.
        recipe: Its sections `registers`, `crops`, `filters` and `loss` are used.
        size: Side of the square images in pixels.
        reference_3SS: The reference image, uint8, at that size.
        channels: Channels masked before every normalisation.
        bf16: Run the backbone in bfloat16; filters and losses never are.
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
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._adapter = adapter
        self._crops, self._filters, self._loss = recipe.crops, recipe.filters, recipe.loss
        self._fill = recipe.registers.fill
        self._bf16 = bf16
        self.size = size
        self.grid = backbone.grid(size, size)
        registers = recipe.registers
        self.width = border_width(self.grid, registers.r_reg, registers.rounding)
        self.canvas = canvas_size((size, size), self.width, backbone.patch_size)
        self._wide = max(self.width, recipe.loss.consistency_width)
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
        reference = normalize(reference_3SS[None], mean=backbone.mean, std=backbone.std)
        self.register_buffer("reference_13SS", reference, persistent=False)
        self.reference_13SS: Tensor
        self._reference_1SC: Tensor | None = None

    @property
    def num_registers(self) -> int:
        """Register tokens of an image, R."""
        h, w = self.grid
        return (h + 2 * self.width) * (w + 2 * self.width) - h * w

    def train(self, mode: bool = True) -> "Refiner":
        """Switch the adapter's dropout; the backbone stays in evaluation mode."""
        super().train(mode)
        self._adapter.train_dropout(mode)
        return self

    def draw(self, batch: int, *, progress: float, generator: torch.Generator) -> StepDraws:
        """Draw the random choices of a step, see `draw_step`."""
        consistent = self._loss.lambda_con > 0 and progress >= self._loss.consistency_start
        return draw_step(
            batch,
            generator,
            crops=self._crops,
            fill=self._fill,
            detector_share=self._filters.register_guided.detector_share,
            num_registers=self.num_registers,
            size=self.size,
            margin=self.width * self.backbone.patch_size,
            consistency_margin=self._wide * self.backbone.patch_size if consistent else None,
        )

    def forward(self, images_B3SS: Tensor, draws: StepDraws) -> StepOutput:
        """The loss of a batch: a pure function of weights, images and draws.

        Args:
            images_B3SS: uint8, on the module's device.
            draws: Of `draw`.
        """
        backbone = self.backbone
        pixels_B3SS = normalize(images_B3SS, mean=backbone.mean, std=backbone.std)
        views_Q3SS = crop_views(pixels_B3SS, draws.boxes_BK4)
        with _seeded(draws.dropout_seed, pixels_B3SS.device):
            student = self._student_view(pixels_B3SS, draws)
            relations_QNC = self._consistency_target(views_Q3SS, draws)
        teacher = self._teacher_view(pixels_B3SS, views_Q3SS, draws)

        scores = self._compare(teacher)
        targets_QNC = teacher.crop_QNC
        if self._loss.matched:
            targets_QNC = match_targets(teacher.crop_QNC, teacher.full_BNC)
        clean_QN, shares = self._filter(scores, targets_QNC, student, teacher, draws)

        loss, terms = self._losses(student, teacher, targets_QNC, clean_QN, scores, draws)
        if relations_QNC is not None:
            consistency = consistency_loss(
                student.crop_QNC, relations_QNC, temperature=self._loss.temperature
            )
            loss = loss + self._loss.lambda_con * consistency
            terms["consistency"] = consistency
        terms = {"loss": loss, **terms, **shares}
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})

    def _student_view(self, pixels_B3SS: Tensor, draws: StepDraws) -> StudentView:
        stripped = self._encode_surrounded(pixels_B3SS, draws.border, self.width)
        image_BNC = unit_tokens(stripped.image, self.channels)
        crop_QNC = unit_tokens(crop_tokens(image_BNC, draws.boxes_BK4, self.grid))
        return StudentView(image_BNC, unit_tokens(stripped.registers, self.channels), crop_QNC)

    @torch.no_grad()
    def _consistency_target(self, views_Q3SS: Tensor, draws: StepDraws) -> Tensor | None:
        if not draws.with_consistency:
            return None
        stripped = self._encode_surrounded(views_Q3SS, draws.consistency_border, self._wide)
        return unit_tokens(stripped.image, self.channels)

    @torch.no_grad()
    def _teacher_view(
        self, pixels_B3SS: Tensor, views_Q3SS: Tensor, draws: StepDraws
    ) -> TeacherView:
        composite = compose(
            views_Q3SS,
            self.reference_13SS,
            side=draws.side,
            share=self._crops.strip_share,
            patch_size=self.backbone.patch_size,
        )
        with self._adapter.off():
            with self.backbone.tap_attention(self._layers) as taps:
                tokens_QTC = self._unit_features(composite.pixels)
            full_BNC = self._unit_features(pixels_B3SS)
        crop_positions_N = composite.is_crop.nonzero().flatten()
        return TeacherView(
            crop_QNC=tokens_QTC[:, crop_positions_N],
            strip_QSC=tokens_QTC[:, ~composite.is_crop],
            full_BNC=full_BNC,
            taps=[taps[layer] for layer in self._layers],
            crop_index_N=crop_positions_N + self.backbone.num_prefix_tokens,
        )

    @torch.no_grad()
    def reference_tokens(self) -> Tensor:
        """The teacher's unit tokens of the reference image, [1, S, C]; encoded once."""
        if self._reference_1SC is None:
            with self._adapter.off():
                self._reference_1SC = self._unit_features(self.reference_13SS)
        return self._reference_1SC

    def _compare(self, teacher: TeacherView) -> Comparisons:
        return Comparisons(
            reference_QN=max_cosine_scores(teacher.crop_QNC, self.reference_tokens()),
            strip_QN=max_cosine_scores(teacher.crop_QNC, teacher.strip_QSC),
        )

    @torch.no_grad()
    def _filter(
        self,
        scores: Comparisons,
        targets_QNC: Tensor,
        student: StudentView,
        teacher: TeacherView,
        draws: StepDraws,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clean mask, and the share of tokens that each filter leaves: of all, and of what
        the filters before it kept for `attention_hijack`."""
        fp_gp, guided = self._filters.fp_gp, self._filters.register_guided
        hijack = self._filters.attention_hijack
        clean_QN = torch.ones_like(scores.reference_QN, dtype=torch.bool)
        shares: dict[str, Tensor] = {}
        if fp_gp.enabled:
            for name, score_QN in (("fixed_pattern", scores[0]), ("global_proxy", scores[1])):
                passed_QN = below_threshold(
                    score_QN, criterion=fp_gp.criterion, threshold=fp_gp.threshold
                )
                shares[f"clean_{name}"] = passed_QN.float().mean()
                clean_QN = clean_QN & passed_QN
        if guided.enabled:
            index = draws.detectors_BD.to(clean_QN.device)[..., None]
            detectors_BDC = student.registers_BRC.detach().take_along_dim(index, dim=1)
            passed_QN = register_guided(targets_QNC, detectors_BDC, threshold=guided.threshold)
            shares["clean_register_guided"] = passed_QN.float().mean()
            clean_QN = clean_QN & passed_QN
        if hijack.enabled:
            inflow_QN = crop_inflow(
                teacher.taps, teacher.crop_index_N, ~clean_QN, variant=hijack.variant
            )
            kept = clean_QN.sum().clamp(min=1)
            clean_QN = attention_hijack(inflow_QN, clean_QN, threshold=hijack.threshold)
            shares["clean_attention_hijack"] = clean_QN.sum() / kept
        shares["clean"] = clean_QN.float().mean()
        return clean_QN, shares

    def _losses(
        self,
        student: StudentView,
        teacher: TeacherView,
        targets_QNC: Tensor,
        clean_QN: Tensor,
        scores: Comparisons,
        draws: StepDraws,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        section = self._loss
        sparsity = sparsity_level(targets_QNC, clean_QN)
        refinement = refinement_loss(
            student.crop_QNC,
            targets_QNC,
            teacher.full_BNC if section.matched else teacher.crop_QNC,
            clean_QN,
            temperature=section.temperature,
            uniformity=section.uniformity,
            sparsity=sparsity,
        )
        register_uniformity = register_uniformity_loss(
            student.image_BNC,
            student.registers_BRC,
            temperature=section.temperature,
            affinity_floor=section.affinity_floor,
        )
        absorption = absorption_loss(
            student.registers_BRC,
            student.crop_QNC,
            self._candidates(scores, teacher, draws),
            teacher.full_BNC,
            temperature=section.temperature,
            sparsity=sparsity,
            crop_weight=section.crop_weight,
            crop_top=section.crop_top,
            sparsity_margin=section.sparsity_margin,
        )
        loss = (
            refinement.total
            + section.lambda_uni * register_uniformity
            + section.lambda_spu * absorption
        )
        return loss, {
            "refinement": refinement.total,
            "alignment": refinement.alignment,
            "uniformity": refinement.uniformity,
            "register_uniformity": register_uniformity,
            "absorption": absorption,
            "sparsity": sparsity,
        }

    def _candidates(self, scores: Comparisons, teacher: TeacherView, draws: StepDraws) -> Tensor:
        """Likely spurious crop tokens, [Q, 2R, C]."""
        share = self._filters.fp_gp.candidate_share
        uniform_2QR = draws.candidates_2BKR.flatten(1, 2).to(teacher.crop_QNC.device)
        picks = [
            sample_candidates(score_QN, uniform_QR, share=share)
            for score_QN, uniform_QR in zip(scores, uniform_2QR, strict=True)
        ]
        return teacher.crop_QNC.take_along_dim(torch.cat(picks, dim=1)[..., None], dim=1)

    def _encode_surrounded(
        self, pixels_X3SS: Tensor, border: Tensor | None, width: int
    ) -> Stripped:
        patch = self.backbone.patch_size
        if border is None:
            assert self.border is not None  # drawn otherwise
            border = self.border(canvas_size((self.size, self.size), width, patch), width)
        border = border.to(pixels_X3SS.device, non_blocking=True)
        canvas = surround(pixels_X3SS, border, width=width, patch_size=patch)
        return strip(self._features(canvas), self.grid, width)

    def _unit_features(self, pixels: Tensor) -> Tensor:
        return unit_tokens(self._features(pixels), self.channels)

    def _features(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self.backbone.encode(pixels).tokens


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators seeded inside, and as they were after: dropout takes no generator."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
