"""What a run and `doctor` do before training: base, size, reference image, first images, channels.

Dimension key: I = images, S = side in pixels, N = tokens of an image, n = tokens taken of each,
C = channels.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from backbone import Backbone, RegisterBorder, has_bf16_matrix_units, is_artifact
from backbone.artifact import read_manifest
from backbone.catalog import find
from backbone.errors import ImageError, ImageSizeError
from backbone.preprocess import normalize
from backbone.registers import strip, surround
from trainer.channels import ChannelMask, find_channel_mask
from trainer.config import BackboneSection, ChannelsSection, Recipe
from trainer.crops import strip_width
from trainer.data import BadImages, Source, source_image, square_image
from trainer.errors import DataError, RecipeError
from trainer.reference_image import SHIPPED

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def determinism(mode: bool) -> Iterator[None]:
    """Inside, with `mode`, only algorithms that give the same bits again are allowed."""
    if not mode:
        yield
        return
    # Read when cuBLAS starts; without it PyTorch refuses to multiply in this mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def load_backbone(recipe: Recipe, *, dtype: torch.dtype | None = None) -> Backbone:
    """The backbone that a recipe names, on the CPU, its parameters in `dtype` (the recipe's).

    Raises:
        ModelError: see `Backbone.load`.
    """
    section = recipe.backbone
    with torch.random.fork_rng(devices=[]):
        # Random weights are not in the checkpoint either: a resumed run must draw the same again.
        torch.manual_seed(recipe.run.seed)
        return Backbone.load(
            section.name,
            weights=Path(section.weights) if section.weights else None,
            random_weights=section.random_weights,
            dense_norm=_dense_norm(section),
            dtype=dtype or getattr(torch, section.dtype),
        )


def _dense_norm(section: BackboneSection) -> bool | None:
    """What the recipe says, else the manifest of an artifact that is refined again."""
    folder = Path(section.name.removeprefix("local-dir:"))
    if section.dense_norm is None and find(section.name) is None and is_artifact(folder):
        return read_manifest(folder).dense_norm
    return section.dense_norm


def training_size(recipe: Recipe, backbone: Backbone) -> int:
    """Side of the square training images in pixels; checks the recipe's other sizes too.

    Raises:
        ImageSizeError: one is not whole patches, or too small for the reference strip.
    """
    height, width = backbone.native_size
    if recipe.data.size is None and height != width:
        raise ImageSizeError(
            f"{backbone.name} is made for {height}x{width} px, and training images are square; "
            "set data.size"
        )
    main_size = recipe.data.size or height
    for size in (main_size, *recipe.data.other_sizes):
        side, _ = backbone.grid(size, size)
        strip_side = strip_width(side, recipe.crops.strip_share)
        if strip_side > side:
            raise ImageSizeError(
                f"an image of {size}x{size} px is {side} patches wide, and the reference strip "
                f"beside its crops {strip_side}; set data.size higher or crops.strip_share lower"
            )
    return main_size


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether the backbone runs in bfloat16 there.

    Raises:
        RecipeError: it does not, and its weights are to be held in bfloat16.
    """
    asked = recipe.run.precision
    bf16 = has_bf16_matrix_units(device) if asked == "auto" else asked == "bf16"
    if recipe.backbone.dtype == "bfloat16" and not bf16:
        raise RecipeError(
            f"backbone.dtype is bfloat16, and the run on {device} is in fp32 (run.precision is "
            f"{asked}); set backbone.dtype=float32, or run.precision=bf16"
        )
    return bf16


def reference_image(recipe: Recipe, size: int) -> Tensor:
    """The recipe's reference image, uint8 [3, size, size].

    Raises:
        DataError: its file cannot be read.
    """
    path = Path(recipe.crops.reference) if recipe.crops.reference else SHIPPED
    try:
        return square_image(path, size=size, section=recipe.data)
    except OSError as error:
        raise DataError(f"the reference image {path} cannot be read: {error}") from error


def readable_images(
    folder: Source,
    order: Iterable[int],
    recipe: Recipe,
    bad: BadImages,
    *,
    size: int,
    count: int,
) -> Tensor:
    """The first `count` readable images of an order, uint8 [I, 3, size, size].

    Raises:
        DataError: not one can be read, or an unreadable one is not to be skipped.
    """
    images: list[Tensor] = []
    for index in order:
        if len(images) == count:
            break
        try:
            images.append(source_image(folder, index, size=size, section=recipe.data))
        except (ImageError, OSError) as error:
            bad.meet(folder.path(index), error, of=len(folder))
    if not images:
        raise DataError(f"not one of {len(folder)} images could be read")
    return torch.stack(images)


@torch.no_grad()
def encode_raw(backbone: Backbone, images_I3SS: Tensor, *, batch: int, bf16: bool) -> Tensor:
    """Raw tokens of images, without border, float32 on the CPU: [I, N, C]."""
    device = next(backbone.parameters()).device
    tokens = []
    for chunk in torch.split(images_I3SS, batch):
        pixels = normalize(chunk.to(device), mean=backbone.mean, std=backbone.std)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            tokens.append(backbone.encode(pixels).tokens.float().cpu())
    return torch.cat(tokens)


@torch.no_grad()
def encode_surrounded(
    backbone: Backbone, images_I3SS: Tensor, border: Tensor, *, width: int, bf16: bool
) -> Tensor:
    """Tokens as they will be served, float32 on the CPU: [I, N, C].

    Args:
        backbone: With its adapter switched on, or merged.
        images_I3SS: uint8.
        border: Pixels of a canvas around such an image, see `RegisterBorder.pixels`.
        width: Of the border, in patches.
        bf16: Run the backbone in bfloat16.
    """
    device = next(backbone.parameters()).device
    grid = backbone.grid(*images_I3SS.shape[-2:])
    tokens = []
    for image in torch.split(images_I3SS, 1):
        pixels = normalize(image.to(device), mean=backbone.mean, std=backbone.std)
        canvas = surround(pixels, border.to(device), width=width, patch_size=backbone.patch_size)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            features = backbone.encode(canvas)
        tokens.append(strip(features.tokens, grid, width).image.float().cpu())
    return torch.cat(tokens)


def register_border(recipe: Recipe) -> RegisterBorder:
    """The border that the artifact is served with."""
    section = recipe.registers
    return RegisterBorder(
        r_reg=section.r_reg, rounding=section.rounding, fill=section.fill, seed=section.seed
    )


def channel_bank(tokens_INC: Tensor, section: ChannelsSection, *, seed: int) -> Tensor:
    """Random tokens of each image for the search for channels: [I, n, C]."""
    generator = torch.Generator().manual_seed(seed)
    picks_INn = torch.rand(tokens_INC.shape[:2], generator=generator).argsort(dim=-1)
    return tokens_INC.take_along_dim(picks_INn[:, : section.num_tokens, None], dim=1)


def search_channels(bank_INC: Tensor, section: ChannelsSection) -> ChannelMask:
    """`find_channel_mask` with the recipe's numbers."""
    return find_channel_mask(
        bank_INC,
        max_channels=section.max_channels,
        threshold=section.threshold,
        min_gain=section.min_gain,
        candidate_pool=section.candidate_pool,
    )


def channel_mask(
    backbone: Backbone,
    recipe: Recipe,
    folder: Source,
    bad: BadImages,
    *,
    size: int,
    bf16: bool,
) -> list[int]:
    """The channels that a run masks; none where the search is off or has a single image."""
    section = recipe.channels
    if section.max_channels == 0:
        return []
    order = folder.order(0, recipe.run.seed)
    images = readable_images(folder, order, recipe, bad, size=size, count=section.num_images)
    if len(images) < 2:
        logger.warning("no channel mask: it needs two images, and there is one")
        return []
    tokens_INC = encode_raw(backbone, images, batch=recipe.data.batch_size, bf16=bf16)
    found = search_channels(channel_bank(tokens_INC, section, seed=recipe.run.seed), section)
    logger.info(
        "channel mask %s from %d images: cross-image cosine %.3f, stopped by %s",
        found.channels,
        len(images),
        found.cosine,
        found.stop_reason,
    )
    return found.channels
