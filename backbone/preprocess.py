"""From the bytes of an image file to normalised pixels: the only copy of it.

    pixels = decode_image(data)                           # uint8 [3, H, W], upright, RGB
    size = resolve_size(H, W, 512, patch_size=16)         # longest side 512, whole patches
    pixels = resize_image(pixels, size)                   # uint8 [3, h, w]
    batch = normalize(pixels[None], mean=mean, std=std)   # float [1, 3, h, w]

Trainer and service share this module, so what is served is what was trained on. Pixel positions
follow the edge convention: an image of width W spans x in [0, W], and the centre of its first
pixel is at 0.5.

Dimension key: B = images, H, W = height and width in pixels, h, w = the same after resizing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from backbone.decoders import (
    DECODER_VERSION,
    DEFAULT_MAX_PIXELS,
    ImageHeader,
    decode_image,
    decode_jpegs_on_device,
    read_image_header,
    suits_nvjpeg,
    supported_formats,
)
from backbone.errors import (
    ImageSizeError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)

__all__ = [
    "DECODER_VERSION",
    "ImageHeader",
    "Interpolation",
    "Normalization",
    "can_resize_on_cuda",
    "decode_image",
    "decode_jpegs_on_device",
    "load_image",
    "normalize",
    "patch_affine",
    "read_image_header",
    "resize_image",
    "resolve_size",
    "suits_nvjpeg",
    "supported_formats",
]

Interpolation = Literal["bicubic", "bilinear"]


def load_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """`decode_image` of a file; the errors name the path.

    Raises:
        FileNotFoundError, PermissionError: as the operating system says.
        UnsupportedImageError, UndecodableImageError, ImageTooLargeError: see `backbone.errors`.
    """
    data = Path(path).read_bytes()
    try:
        return decode_image(data, max_pixels=max_pixels)
    except (UnsupportedImageError, UndecodableImageError, ImageTooLargeError) as error:
        raise type(error)(f"{path}: {error}") from error


def resolve_size(
    height: int, width: int, size: int | Sequence[int], patch_size: int
) -> tuple[int, int]:
    """The size that an image is resized to.

    Args:
        height, width: The image's own size in pixels.
        size: `(h, w)` in pixels, each a whole number of patches; or one number, the longest side:
            the other side keeps the aspect ratio, and both are rounded to whole patches.
        patch_size: Side of a patch in pixels.

    Returns:
        `(h, w)` in pixels, multiples of `patch_size`, at least one patch each.

    Raises:
        ImageSizeError: `size` is not positive, or a pair that is not whole patches.
    """
    if isinstance(size, int):
        if size < patch_size:
            raise ImageSizeError(
                f"longest side of {size} px is less than one {patch_size} px patch; "
                f"ask for {patch_size} px or more"
            )
        scale = size / max(height, width)
        return (
            max(1, round(height * scale / patch_size)) * patch_size,
            max(1, round(width * scale / patch_size)) * patch_size,
        )
    if len(size) != 2:
        raise ImageSizeError(f"size has {len(size)} numbers; give (height, width) or one number")
    h, w = size
    if h < patch_size or w < patch_size or h % patch_size or w % patch_size:
        near_h, near_w = (max(1, round(side / patch_size)) * patch_size for side in (h, w))
        raise ImageSizeError(
            f"size {h}x{w} px is not a whole number of {patch_size} px patches; "
            f"ask for {near_h}x{near_w}"
        )
    return h, w


def resize_image(
    pixels_3HW: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Resize uint8 pixels with antialiasing; the very tensor when the size is already right.

    Args:
        pixels_3HW: uint8 [3, H, W], or several of a size as [B, 3, H, W], on any device. CUDA
            rounds differently: its pixels are within one level of a CPU's.
        size: `(h, w)` in pixels.
        interpolation: Filter.
    """
    height, width = pixels_3HW.shape[-2:]
    if (height, width) == tuple(size):
        return pixels_3HW
    if pixels_3HW.is_cuda and not can_resize_on_cuda((height, width), size):
        return resize_image(pixels_3HW.cpu(), size, interpolation).to(pixels_3HW.device)
    mode = transforms.InterpolationMode(interpolation)
    resized: Tensor = transforms.resize(pixels_3HW, list(size), interpolation=mode, antialias=True)
    return resized


def can_resize_on_cuda(original: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether torch's antialiasing CUDA kernel takes a resize; if not, it is done on the CPU.

    The kernel keeps its filter in shared memory, 48 KiB, which a bicubic one of more than ten
    times downscaling does not fit.
    """
    return all(old <= 8 * new for old, new in zip(original, resized, strict=True))


class Normalization(NamedTuple):
    """What makes a backbone's input of pixels: `pixels * scale - shift`, on one device."""

    scale_311: Tensor  # float32
    shift_311: Tensor

    @classmethod
    def of(
        cls, mean: Sequence[float], std: Sequence[float], device: torch.device | str
    ) -> "Normalization":
        """That of a mean and a standard deviation per channel, of pixels between 0 and 1."""
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32, device=device))
        shift = torch.tensor(mean, device=device) * 255.0 * scale
        return cls(scale.view(3, 1, 1), shift.view(3, 1, 1))

    def __call__(self, pixels_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 pixels to the backbone's input, in `dtype`."""
        return (pixels_B3HW.float() * self.scale_311 - self.shift_311).to(dtype)


def normalize(
    pixels_B3HW: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 pixels to the backbone's input: `(pixels / 255 - mean) / std`, channel by channel."""
    return Normalization.of(mean, std, pixels_B3HW.device)(pixels_B3HW, dtype)


def patch_affine(
    original: tuple[int, int], resized: tuple[int, int], patch_size: int
) -> list[list[float]]:
    """The map from a position in the original image to one in the patch grid.

    Args:
        original: `(height, width)` of the upright image in pixels.
        resized: `(h, w)` that it was resized to.
        patch_size: Side of a patch in pixels.

    Returns:
        A 2x3 matrix: `[x_patch, y_patch] = A @ [x, y, 1]`, edge convention on both sides, so
        that patch (row, column) covers `y_patch` in [row, row + 1] and `x_patch` in
        [column, column + 1].
    """
    (height, width), (h, w) = original, resized
    return [[w / width / patch_size, 0.0, 0.0], [0.0, h / height / patch_size, 0.0]]
