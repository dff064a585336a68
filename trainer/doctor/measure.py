"""What the filters of a recipe see in a backbone that has not been trained yet.

Everything is computed as the first training step does: the same crops, composites, comparisons and
batches, with the functions that the step calls. The student is the teacher then, with a border.

Dimension key: I = images, B = images at a time, K = crops of an image, Q = crops, N = tokens of a
crop, L = blocks, C = channels, S = side in pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from backbone import Backbone
from backbone.preprocess import normalize
from backbone.registers import border_width, strip, surround
from trainer.channels import unit_tokens
from trainer.config import ChannelsSection, Recipe
from trainer.crops import compose, crop_views
from trainer.draws import StepDraws, draw_step
from trainer.filters import attention_hijack, below_threshold, crop_inflow, max_cosine_scores
from trainer.losses import match_targets
from trainer.prepare import channel_bank, search_channels

# Every block's queries and keys are kept until their inflow is computed: 4 GiB for an image of the
# largest backbones.
_IMAGES_AT_ONCE = 1


class ChannelFinding(NamedTuple):
    """Channels worth masking, and the cross-image cosine before and after each of them."""

    channels: list[int]
    cosines: list[float]
    stop_reason: str


class CropScores(NamedTuple):
    """Of every token of every crop, float32 on the CPU; crops of the first image first."""

    fixed_pattern_QN: Tensor
    """Best cosine with the reference image."""
    global_proxy_QN: Tensor
    """Best cosine with the strip beside the crop."""
    register_QN: Tensor
    """Best cosine of the token's target with an untrained border's registers."""
    inflow_QN: Tensor
    """Attention received in the recipe's layers, from tokens that earlier filters kept."""
    layer_inflow_LQN: Tensor
    """Attention received in each block from all of the crop's tokens."""


class Masks(NamedTuple):
    """True = clean, [Q, N] each. `clean` is of the filters that are enabled, together."""

    fixed_pattern: Tensor
    global_proxy: Tensor
    register_guided: Tensor
    attention_hijack: Tensor
    clean: Tensor


class Shown(NamedTuple):
    """What is drawn of the first crop of an image."""

    image_3SS: Tensor
    box_4: Tensor
    view_3SS: Tensor
    tokens_NC: Tensor
    crop: int
    """Its number among the crops."""


class Measured(NamedTuple):
    scores: CropScores
    shown: list[Shown]


def measure_channels(tokens_INC: Tensor, section: ChannelsSection, *, seed: int) -> ChannelFinding:
    """Search for channels as a run does, and tell the cosine after each that was found."""
    bank_INC = channel_bank(tokens_INC, section, seed=seed)
    found = search_channels(bank_INC, section)
    cosines = [
        search_channels(bank_INC, section.model_copy(update={"max_channels": count})).cosine
        for count in range(len(found.channels) + 1)
    ]
    return ChannelFinding(found.channels, cosines, found.stop_reason)


@torch.no_grad()
def measure_crops(
    backbone: Backbone,
    images_I3SS: Tensor,
    reference_3SS: Tensor,
    recipe: Recipe,
    *,
    channels: list[int],
    bf16: bool,
    num_shown: int,
) -> Measured:
    """Score every token of every crop.

    Args:
        backbone: Without adapter, on its device.
        images_I3SS, reference_3SS: uint8.
        recipe: Its sections `crops`, `filters`, `registers` and `loss.matched` are used.
        channels: Masked channels.
        bf16: Run the backbone in bfloat16.
        num_shown: Images of which the first crop is kept to be drawn.
    """
    eye = Eye(backbone, reference_3SS, recipe, channels=channels, bf16=bf16)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    parts: list[CropScores] = []
    shown: list[Shown] = []
    for start in range(0, len(images_I3SS), _IMAGES_AT_ONCE):
        images_B3SS = images_I3SS[start : start + _IMAGES_AT_ONCE]
        draws = eye.draw(len(images_B3SS), generator)
        scores, views_Q3SS, tokens_QNC = eye.score(images_B3SS, draws)
        parts.append(scores)
        for number, image_3SS in enumerate(images_B3SS):
            crop = number * recipe.crops.num_crops
            if len(shown) < num_shown:
                shown.append(
                    Shown(
                        image_3SS,
                        draws.boxes_BK4[number, 0],
                        views_Q3SS[crop],
                        tokens_QNC[crop],
                        start * recipe.crops.num_crops + crop,
                    )
                )
    joined = (torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
    return Measured(CropScores(*joined), shown)


class Eye:
    """A backbone and what its tokens are compared with."""

    def __init__(
        self,
        backbone: Backbone,
        reference_3SS: Tensor,
        recipe: Recipe,
        *,
        channels: list[int],
        bf16: bool,
    ) -> None:
        self._backbone, self._recipe, self._bf16 = backbone, recipe, bf16
        self._device = next(backbone.parameters()).device
        self._channels = torch.tensor(channels, device=self._device) if channels else None
        self._size = reference_3SS.shape[-1]
        self._grid = backbone.grid(self._size, self._size)
        registers = recipe.registers
        self._width = border_width(self._grid, registers.r_reg, registers.rounding)
        self._layers = recipe.filters.attention_hijack.layer_range(backbone.depth)
        self._reference_13SS = self._pixels(reference_3SS[None])
        self._reference_1SC = self._unit(self._reference_13SS)

    def draw(self, batch: int, generator: torch.Generator) -> StepDraws:
        """The random choices of a step with `batch` images."""
        recipe = self._recipe
        h, w = self._grid
        return draw_step(
            batch,
            generator,
            crops=recipe.crops,
            # A learned border is zeros before training.
            fill="zeros" if recipe.registers.fill == "learnable" else recipe.registers.fill,
            detector_share=recipe.filters.register_guided.detector_share,
            num_registers=(h + 2 * self._width) * (w + 2 * self._width) - h * w,
            size=self._size,
            margin=self._width * self._backbone.patch_size,
            consistency_margin=None,
        )

    def score(self, images_B3SS: Tensor, draws: StepDraws) -> tuple[CropScores, Tensor, Tensor]:
        """Scores, and the crops' pixels in [0, 1] and tokens, on the CPU."""
        backbone, recipe = self._backbone, self._recipe
        pixels_B3SS = self._pixels(images_B3SS)
        views_Q3SS = crop_views(pixels_B3SS, draws.boxes_BK4)
        composite = compose(
            views_Q3SS,
            self._reference_13SS,
            side=draws.side,
            share=recipe.crops.strip_share,
            patch_size=backbone.patch_size,
        )
        with backbone.tap_attention(range(backbone.depth)) as taps:
            tokens_QTC = self._unit(composite.pixels)
        crop_QNC = tokens_QTC[:, composite.is_crop]
        fixed_QN = max_cosine_scores(crop_QNC, self._reference_1SC)
        proxy_QN = max_cosine_scores(crop_QNC, tokens_QTC[:, ~composite.is_crop])

        targets_QNC = crop_QNC
        if recipe.loss.matched:
            targets_QNC = match_targets(crop_QNC, self._unit(pixels_B3SS))
        index = draws.detectors_BD.to(self._device)[..., None]
        registers_BRC = self._registers(pixels_B3SS, draws)
        register_QN = max_cosine_scores(targets_QNC, registers_BRC.take_along_dim(index, dim=1))

        kept_QN = _kept_by_cosines(fixed_QN, proxy_QN, register_QN, recipe)
        positions_N = composite.is_crop.nonzero().flatten() + backbone.num_prefix_tokens
        variant = recipe.filters.attention_hijack.variant
        depth = range(backbone.depth)
        every = [crop_inflow([taps[block]], positions_N, variant=variant) for block in depth]
        inflow_QN = crop_inflow(
            [taps[layer] for layer in self._layers], positions_N, ~kept_QN, variant=variant
        )
        scores = (fixed_QN, proxy_QN, register_QN, inflow_QN, torch.stack(every))
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        seen_Q3SS = (views_Q3SS.cpu() * std + mean).clamp(0, 1)
        return CropScores(*(s.float().cpu() for s in scores)), seen_Q3SS, crop_QNC.cpu()

    def _registers(self, pixels_B3SS: Tensor, draws: StepDraws) -> Tensor:
        assert draws.border is not None  # `draw` never asks for a learned one
        canvas = surround(
            pixels_B3SS,
            draws.border.to(self._device),
            width=self._width,
            patch_size=self._backbone.patch_size,
        )
        return strip(self._unit(canvas), self._grid, self._width).registers

    def _pixels(self, images: Tensor) -> Tensor:
        backbone = self._backbone
        return normalize(images.to(self._device), mean=backbone.mean, std=backbone.std)

    def _unit(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            tokens = self._backbone.encode(pixels).tokens
        return unit_tokens(tokens, self._channels)


def zscores(scores_QN: Tensor) -> Tensor:
    """Standard deviations over each crop's own mean; zeros where a crop's scores are all equal."""
    deviation_Q1 = scores_QN.std(dim=-1, keepdim=True).clamp(min=1e-6)
    return (scores_QN - scores_QN.mean(dim=-1, keepdim=True)) / deviation_Q1


def filter_masks(scores: CropScores, recipe: Recipe) -> Masks:
    """What the recipe's thresholds leave; filters that are off are told too."""
    fp_gp, guided = recipe.filters.fp_gp, recipe.filters.register_guided
    hijack = recipe.filters.attention_hijack
    fixed_QN, proxy_QN = (
        below_threshold(s, criterion=fp_gp.criterion, threshold=fp_gp.threshold)
        for s in (scores.fixed_pattern_QN, scores.global_proxy_QN)
    )
    kept_QN = _kept_by_cosines(
        scores.fixed_pattern_QN, scores.global_proxy_QN, scores.register_QN, recipe
    )
    crops_per_batch = recipe.data.batch_size * recipe.crops.num_crops
    fed_QN = torch.cat(
        [
            attention_hijack(inflow, kept, threshold=hijack.threshold)
            for inflow, kept in zip(
                torch.split(scores.inflow_QN, crops_per_batch),
                torch.split(kept_QN, crops_per_batch),
                strict=True,
            )
        ]
    )
    return Masks(
        fixed_pattern=fixed_QN,
        global_proxy=proxy_QN,
        register_guided=scores.register_QN < guided.threshold,
        attention_hijack=fed_QN | ~kept_QN,  # it judges only what the others kept
        clean=fed_QN if hijack.enabled else kept_QN,
    )


def kept_shares(masks: Masks, recipe: Recipe) -> dict[str, float]:
    """Shares as metrics.jsonl has them; of `attention_hijack`, of what the filters before kept."""
    names = ("fixed_pattern", "global_proxy", "register_guided")
    shares = {name: float(getattr(masks, name).float().mean()) for name in names}
    kept_QN = torch.ones_like(masks.clean)
    if recipe.filters.fp_gp.enabled:
        kept_QN = masks.fixed_pattern & masks.global_proxy
    if recipe.filters.register_guided.enabled:
        kept_QN = kept_QN & masks.register_guided
    fed = (kept_QN & masks.attention_hijack).sum()
    shares["attention_hijack"] = float(fed / kept_QN.sum().clamp(min=1))
    return shares | {"clean": float(masks.clean.float().mean())}


def _kept_by_cosines(
    fixed_QN: Tensor, proxy_QN: Tensor, register_QN: Tensor, recipe: Recipe
) -> Tensor:
    fp_gp, guided = recipe.filters.fp_gp, recipe.filters.register_guided
    kept_QN = torch.ones_like(fixed_QN, dtype=torch.bool)
    if fp_gp.enabled:
        for score_QN in (fixed_QN, proxy_QN):
            kept_QN = kept_QN & below_threshold(
                score_QN, criterion=fp_gp.criterion, threshold=fp_gp.threshold
            )
    if guided.enabled:
        kept_QN = kept_QN & (register_QN < guided.threshold)
    return kept_QN
