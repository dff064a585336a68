"""Measure a backbone by a recipe, and judge what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backbone import Artifact, Backbone, is_artifact, load_artifact
from trainer.config import Recipe
from trainer.data import BadImages, find_images
from trainer.doctor import suggest
from trainer.doctor.measure import (
    ChannelFinding,
    CropScores,
    Masks,
    Shown,
    filter_masks,
    kept_shares,
    measure_channels,
    measure_crops,
)
from trainer.doctor.suggest import Advice
from trainer.doctor.widths import WidthResult, measure_widths
from trainer.prepare import (
    encode_raw,
    load_backbone,
    readable_images,
    reference_image,
    register_border,
    training_size,
    uses_bf16,
)
from trainer.recipe_file import Variant, load_recipe

_SHOWN_IMAGES = 4
_WIDTH_IMAGES = 8
"""Images that the widths are compared on: each is encoded some twenty times."""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        shares: Kept by each filter at the recipe's values, see `kept_shares`.
        suggested: The recipe with the suggestions; the recipe itself where there are none.
        suggested_shares: The same shares by it; None where there are no suggestions.
        flags: `section.key=value` each.
        masks: By the suggested recipe, for the pictures.
        tails: See `tail_shares`.
    """

    name: str
    facts: str
    recipe: Recipe
    suggested: Recipe
    flags: list[str]
    advice: dict[str, Advice]
    scores: CropScores
    shares: dict[str, float]
    suggested_shares: dict[str, float] | None
    masks: Masks
    shown: list[Shown]
    grid: tuple[int, int]
    tails: list[float]
    channels: ChannelFinding | None
    widths: list[WidthResult]
    default_width: int
    best_width: int
    num_width_images: int


def examine(
    source: str,
    settings: Sequence[str],
    images: Path,
    *,
    variant: Variant | None = None,
    num_images: int,
    device: torch.device,
    skip_bad_images: bool = False,
) -> Report:
    """Measure the backbone of a recipe on some images.

    Args:
        source, settings, variant: Of `load_recipe`; the suggestions are further settings.
        images: Where images are, see `find_images`.
        num_images: Used at most.
        device: Where to compute.
        skip_bad_images: Skip unreadable images instead of stopping.

    Raises:
        TrainerError, ModelError, ImageError: what the user can mend.
    """
    recipe = load_recipe(source, settings, variant=variant)
    backbone, artifact = _load(recipe)
    recipe = _with_possible_layers(recipe, backbone.depth)
    size = training_size(recipe, backbone)
    reference_3SS = reference_image(recipe, size)
    found = find_images(images, seed=recipe.run.seed, max_images=num_images)
    images_I3SS = readable_images(
        found,
        range(len(found)),
        recipe,
        BadImages(skip=skip_bad_images),
        size=size,
        count=num_images,
    )
    backbone.to(device).eval().requires_grad_(False)
    bf16 = uses_bf16(recipe, device)
    channels = _channels(backbone, images_I3SS, recipe, bf16=bf16)
    masked = channels.channels if channels else []

    def measure(by: Recipe) -> tuple[CropScores, list[Shown], Masks]:
        measured = measure_crops(
            backbone,
            images_I3SS,
            reference_3SS,
            by,
            channels=masked,
            bf16=bf16,
            num_shown=_SHOWN_IMAGES,
        )
        return *measured, filter_masks(measured.scores, by)

    scores, shown, masks = measure(recipe)
    shares = kept_shares(masks, recipe)
    filters = recipe.filters
    advice = {"layers": suggest.advise_layers(scores, recipe)}
    advice["fp_gp"] = suggest.advise_fp_gp(scores, recipe)
    advice["register_guided"] = suggest.advise_register_guided(scores, recipe)
    is_off = {"fp_gp": not filters.fp_gp.enabled, "layers": not filters.attention_hijack.enabled}
    is_off["register_guided"] = not filters.register_guided.enabled
    order = ("fp_gp", "register_guided", "layers")
    flags = [s for name in order if not is_off[name] for s in advice[name].settings]
    suggested, suggested_shares = recipe, None
    if flags:
        suggested = load_recipe(source, [*settings, *flags], variant=variant)
        suggested = _with_possible_layers(suggested, backbone.depth)
        _, _, masks = measure(suggested)  # other thresholds leave out other keys of the attention
        suggested_shares = kept_shares(masks, suggested)

    border = register_border(recipe) if artifact is None else artifact.manifest.border
    few_I3SS = images_I3SS[:_WIDTH_IMAGES]
    learned = None if artifact is None else artifact.learned_border
    if border.fill == "learnable" and learned is None:
        border = border.model_copy(update={"fill": "zeros"})  # what it is before training
    grid = backbone.grid(size, size)
    widths = measure_widths(
        backbone,
        border,
        few_I3SS,
        reference_3SS,
        suggested.filters.fp_gp,
        learned=learned,
        channels=masked,
        strip_share=recipe.crops.strip_share,
        bf16=bf16,
    )
    best, advice["width"] = suggest.advise_width(
        widths, border.width(grid), refined=artifact is not None
    )
    return Report(
        name=recipe.backbone.name,
        facts=f"{backbone.name}, {backbone.depth} blocks of {backbone.embed_dim} channels; "
        f"{len(images_I3SS)} images of {images} at {size} px; recipe {recipe.name}; "
        f"{device.type}, {'bf16' if bf16 else 'fp32'}",
        recipe=recipe,
        suggested=suggested,
        flags=flags,
        advice=advice,
        scores=scores,
        shares=shares,
        suggested_shares=suggested_shares,
        masks=masks,
        shown=shown,
        grid=grid,
        tails=suggest.tail_shares(scores.layer_inflow_LQN),
        channels=channels,
        widths=widths,
        default_width=border.width(grid),
        best_width=best,
        num_width_images=len(few_I3SS),
    )


def _with_possible_layers(recipe: Recipe, depth: int) -> Recipe:
    """Layers of a filter that is off are measured too, and may be another backbone's."""
    hijack = recipe.filters.attention_hijack
    if hijack.enabled or hijack.layers is None or hijack.layers[1] < depth:
        return recipe
    usual = hijack.model_copy(update={"layers": None})
    filters = recipe.filters.model_copy(update={"attention_hijack": usual})
    return recipe.model_copy(update={"filters": filters})


def _load(recipe: Recipe) -> tuple[Backbone, Artifact | None]:
    name = recipe.backbone.name.removeprefix("local-dir:")
    if is_artifact(name) and recipe.backbone.weights is None:
        artifact = load_artifact(name)
        return artifact.backbone, artifact
    return load_backbone(recipe), None


def _channels(
    backbone: Backbone, images_I3SS: Tensor, recipe: Recipe, *, bf16: bool
) -> ChannelFinding | None:
    section = recipe.channels
    if section.max_channels == 0 or len(images_I3SS) < 2:
        return None
    few_I3SS = images_I3SS[: section.num_images]
    tokens_INC = encode_raw(backbone, few_I3SS, batch=1, bf16=bf16)
    return measure_channels(tokens_INC, section, seed=recipe.run.seed)
