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

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from backbone.errors import (
    ImageSizeError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)

# Pillow opens some 40 formats; each is a parser for hostile bytes. These are the ones that
# photographs come in.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF") + (
    ("AVIF",) if features.check("avif") else ()
)
_DEFAULT_MAX_PIXELS = 40_000_000

Interpolation = Literal["bicubic", "bilinear"]


class ImageHeader(NamedTuple):
    """What the header of an image file says, before anything is decoded."""

    format: str
    width: int  # px, as stored: before the EXIF orientation is applied
    height: int  # px
    mode: str


def supported_formats() -> tuple[str, ...]:
    """Names of the image formats that `decode_image` reads."""
    return _FORMATS


def read_image_header(data: bytes, *, max_pixels: int = _DEFAULT_MAX_PIXELS) -> ImageHeader:
    """Read an image's format and size without decoding its pixels.

    Raises:
        UnsupportedImageError: no supported format recognises the bytes.
        UndecodableImageError: the header itself is broken.
        ImageTooLargeError: the header declares more than `max_pixels`.
    """
    with _open(data, max_pixels) as image:
        return ImageHeader(image.format or "?", image.width, image.height, image.mode)


def decode_image(data: bytes, *, max_pixels: int = _DEFAULT_MAX_PIXELS) -> Tensor:
    """Decode an image file to upright RGB.

    EXIF orientation is applied. Of an animation the first frame is taken. Grey, palette, CMYK
    and 16-bit images become 8-bit RGB (16-bit samples are divided by 257); transparent pixels
    are laid over white. Embedded colour profiles are not applied.

    Args:
        data: The whole file.
        max_pixels: Largest number of pixels that the header may declare.

    Returns:
        uint8 [3, H, W], channels-last in memory.

    Raises:
        UnsupportedImageError, UndecodableImageError, ImageTooLargeError: see `backbone.errors`.
    """
    with _open(data, max_pixels) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
        except UnsupportedImageError:
            raise
        except MemoryError as error:
            raise ImageTooLargeError(
                f"the {image.width}x{image.height} px {image.format} image needs more memory "
                "than there is; send a smaller one"
            ) from error
        except Exception as error:  # a damaged file makes Pillow's parsers raise anything
            raise UndecodableImageError(
                f"the {image.format} data are damaged or incomplete ({_reason(error)}); "
                "save the image again"
            ) from error
    array = np.array(rgb)  # a copy that is writable, as torch wants it
    return torch.from_numpy(array).permute(2, 0, 1)


def load_image(path: str | Path, *, max_pixels: int = _DEFAULT_MAX_PIXELS) -> Tensor:
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
    """Resize one uint8 image with antialiasing; the image itself when the size is already right."""
    if tuple(pixels_3HW.shape[-2:]) == tuple(size):
        return pixels_3HW
    mode = transforms.InterpolationMode(interpolation)
    resized: Tensor = transforms.resize(pixels_3HW, list(size), interpolation=mode, antialias=True)
    return resized


def normalize(
    pixels_B3HW: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 pixels to the backbone's input: `(pixels / 255 - mean) / std`, channel by channel."""
    scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32, device=pixels_B3HW.device))
    shift = torch.tensor(mean, device=pixels_B3HW.device) * 255.0 * scale
    normalized = pixels_B3HW.float() * scale.view(3, 1, 1) - shift.view(3, 1, 1)
    return normalized.to(dtype)


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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnsupportedImageError(
            f"{len(data)} bytes that no supported format recognises; "
            f"send one of {', '.join(_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"the image declares more pixels than the {max_pixels} allowed; send a smaller one"
        ) from error
    except Exception as error:  # a damaged header makes Pillow's parsers raise anything
        raise UndecodableImageError(
            f"the image's header is damaged ({_reason(error)}); save the image again"
        ) from error
    if image.width < 1 or image.height < 1:
        raise UndecodableImageError(f"the image is {image.width}x{image.height} px: it is empty")
    if image.width * image.height > max_pixels:
        raise ImageTooLargeError(
            f"the image is {image.width}x{image.height} px, {image.width * image.height} pixels; "
            f"{max_pixels} are allowed: send a smaller one"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint32)
        return Image.fromarray((samples // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        # Pillow's 32-bit mode also carries 16-bit greys; anything beyond has no agreed white.
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise UnsupportedImageError(
                "32-bit integer samples are not supported; send 8 or 16 bit"
            )
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"):
        raise UnsupportedImageError(
            f"colour mode {image.mode} is not supported; send grey, RGB, CMYK or palette images"
        )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
