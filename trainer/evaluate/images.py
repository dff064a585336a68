"""Image files to pixels of a size that a patch grid has.

Labels are laid over the pixels as they are stored, so EXIF orientation is not applied.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainer.evaluate.errors import EvaluationError

# Part of the key of stored features: raise it when the same file gives other pixels.
READER_VERSION = 1
# What Pillow raises for files that are damaged, unknown or too large.
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
    EOFError,
)


@dataclass(frozen=True)
class ShortSide:
    """A size that keeps the aspect: the short side in pixels, both sides then whole patches."""

    pixels: int


# (height, width) for every image, whatever its aspect, or each by its short side.
Size = tuple[int, int] | ShortSide


def check_size(size: Size, patch_size: int, name: str) -> None:
    """
    Args:
        size: Asked for.
        patch_size: Of the backbone.
        name: Of the backbone, for the error.

    Raises:
        EvaluationError: the size is not whole patches of this backbone.
    """
    if isinstance(size, ShortSide):
        if size.pixels < patch_size:
            raise EvaluationError(
                f"short side {size.pixels} px is less than a patch of {name}, {patch_size} px; "
                f"ask for {patch_size} or more"
            )
        return
    height, width = size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        near_h, near_w = (max(1, round(side / patch_size)) * patch_size for side in size)
        raise EvaluationError(
            f"size {height}x{width} px is not a whole number of {name}'s {patch_size} px patches; "
            f"ask for {near_h}x{near_w}, or by --short-side for whole patches of every backbone"
        )


def resolve(size: Size, original: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The (height, width) in pixels that an image of `original` size is resized to."""
    if not isinstance(size, ShortSide):
        return size
    scale = size.pixels / min(original)
    height, width = (max(1, round(side * scale / patch_size)) * patch_size for side in original)
    return height, width


def original_size(path: Path, data: bytes) -> tuple[int, int]:
    """(height, width) of an image file as stored, from its header.

    Raises:
        EvaluationError: the bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.height, opened.width
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (height, width), without keeping its aspect; uint8 `[3, H, W]`.

    Raises:
        EvaluationError: the file cannot be read.
    """
    height, width = size
    try:
        with Image.open(path) as opened:
            resized = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        EvaluationError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> EvaluationError:
    reason = getattr(error, "strerror", None) or str(error)
    return EvaluationError(
        f"the image {path} cannot be read ({reason}); replace the file, or take it out of the data"
    )
