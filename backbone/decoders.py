"""Image files to upright RGB pixels. Callers import it all from `backbone.preprocess`.

JPEG is decoded by torchvision where that gives the pixels of Pillow (`backbone.jpeg` says when),
everything else by Pillow: torchvision's PNG decoder ends the process on damaged files, its WebP
decoder takes files that Pillow finds damaged.

Dimension key: H, W = height and width of the upright image in pixels.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL import __version__ as pillow_version
from torch import Tensor

from backbone import jpeg
from backbone.errors import (
    ImageError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)

# Pillow opens some 40 formats; each is a parser for hostile bytes. These are the ones that
# photographs come in.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF") + (
    ("AVIF",) if features.check("avif") else ()
)
DEFAULT_MAX_PIXELS = 40_000_000
# Pillow reads metadata piece by piece in Python: 32 MB of empty segments would take it 20 s, this
# many pieces 0.2 s. A PNG of 32 MB in the usual chunks of 8 KiB takes 20,000.
_MAX_READS = 200_000

# Raise it with every change here or in `backbone.preprocess` that can change a pixel.
_REVISION = 2


def _decoder_version() -> str:
    parts = [f"refinery-{_REVISION}", f"pillow-{pillow_version}"]
    parts.append(f"libjpeg-turbo-{features.version_feature('libjpeg_turbo')}")
    parts += [f"{codec}-{features.version(codec)}" for codec in ("webp", "avif", "libtiff")]
    parts.append(f"torchvision-{torchvision.__version__ if jpeg.IS_AVAILABLE else None}")
    return " ".join(parts)


# For cache keys: two processes with the same version make the same pixels of a file.
DECODER_VERSION: str = _decoder_version()


class ImageHeader(NamedTuple):
    """What the header of an image file says, before anything is decoded."""

    format: str
    width: int  # px, as stored: before the EXIF orientation is applied
    height: int  # px
    mode: str
    upright_size: tuple[int, int]  # (H, W) px, of what `decode_image` returns


def supported_formats() -> tuple[str, ...]:
    """Names of the image formats that `decode_image` reads."""
    return _FORMATS


def read_image_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageHeader:
    """Read an image's format and size without decoding its pixels.

    Raises:
        UnsupportedImageError: no supported format recognises the bytes.
        UndecodableImageError: the header itself is broken.
        ImageTooLargeError: the header declares more than `max_pixels`.
    """
    with _open(data, max_pixels) as image:
        width, height = image.size
        upright_size = (width, height) if _orientation(image) >= 5 else (height, width)
        return ImageHeader(image.format or "?", width, height, image.mode, upright_size)


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decode an image file to upright RGB.

    EXIF orientation is applied where it stands ahead of the pixels; an EXIF block that cannot be
    read counts as none. Of an animation the first frame is taken. Grey, palette, CMYK and 16-bit
    images become 8-bit RGB (16-bit samples are divided by 257); transparent pixels are laid over
    white. Embedded colour profiles are not applied.

    Args:
        data: The whole file.
        max_pixels: Largest number of pixels that the header may declare.

    Returns:
        uint8 [3, H, W], channels-last in memory.

    Raises:
        UnsupportedImageError, UndecodableImageError, ImageTooLargeError: see `backbone.errors`.
    """
    with _open(data, max_pixels) as image:
        orientation = _orientation(image)
        pixels_3HW = _decode_jpeg(data, image)
        if pixels_3HW is None:
            pixels_3HW = _decode_with_pillow(image)
    return _turn_upright(pixels_3HW, orientation)


def decode_jpegs_on_device(
    datas: Sequence[bytes], device: torch.device, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> list[Tensor | ImageError]:
    """Decode files on `device`, by nvJPEG those that `suits_nvjpeg`, in one batch.

    nvJPEG rounds and upsamples colour differently: its pixels are near those of `decode_image`,
    not equal, so that a cache key has to say which decoder made them. Files that nvJPEG refuses
    or that do not suit it take the way of `decode_image`, in this thread, and are copied.

    Returns:
        Per file: uint8 [3, H, W] upright RGB on `device`, or the error of `decode_image`.
    """
    orientations: dict[int, int] = {}
    for index, data in enumerate(datas):
        with contextlib.suppress(ImageError), _open(data, max_pixels) as image:
            frame = _jpeg_frame(data, image)
            if frame and frame.is_baseline and not jpeg.has_too_many_scans(data):
                orientations[index] = _orientation(image)
    raw = jpeg.decode_batch([datas[index] for index in orientations], device)
    pixels_of = dict(zip(orientations, raw, strict=True))
    results: list[Tensor | ImageError] = []
    for index, data in enumerate(datas):
        pixels_3HW = pixels_of.get(index)
        try:
            results.append(
                decode_image(data, max_pixels=max_pixels).to(device)
                if pixels_3HW is None
                else _turn_upright(pixels_3HW, orientations[index])
            )
        except ImageError as error:
            results.append(error)
    return results


def suits_nvjpeg(data: bytes) -> bool:
    """Whether the header is that of a baseline JPEG, grey or YCbCr, which nvJPEG reads well."""
    frame = jpeg.read_frame(data)
    return frame is not None and frame.is_baseline


def _jpeg_frame(data: bytes, image: Image.Image) -> jpeg.JpegFrame | None:
    """The frame that libjpeg will see, where it has the size that Pillow saw and was checked."""
    if not jpeg.IS_AVAILABLE or image.format not in ("JPEG", "MPO"):
        return None
    frame = jpeg.read_frame(data)
    return frame if frame is not None and (frame.width, frame.height) == image.size else None


def _decode_jpeg(data: bytes, image: Image.Image) -> Tensor | None:
    """Pixels as stored; None where this is a task for Pillow."""
    if image.format in ("JPEG", "MPO") and jpeg.has_too_many_scans(data):
        raise UndecodableImageError(
            f"the JPEG has more than {jpeg.MAX_SCANS} scans, which takes too long to decode; "
            "save the image again"
        )
    frame = _jpeg_frame(data, image)
    return jpeg.decode(data) if frame is not None and frame.is_plain else None


def _decode_with_pillow(image: Image.Image) -> Tensor:
    """Pixels as stored, whatever the mode; of a TIFF upright, since Pillow turns it itself."""
    try:
        image.load()
        rgb = _to_rgb(image)
    except ImageError:
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


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts, of what `load` gives; reads no pixels."""
    if image.format == "TIFF":
        return 1
    try:
        # Not the method of the PNG class, which decodes the image to find metadata behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - a damaged EXIF block makes Pillow's parser raise anything
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn_upright(pixels_3HW: Tensor, orientation: int) -> Tensor:
    """On a CPU channels-last in memory, so that no later step sees how the file was stored."""
    if orientation == 1:
        return pixels_3HW
    has_columns_first = orientation >= 5
    goes_up, goes_left = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    if pixels_3HW.is_cuda:
        if has_columns_first:
            pixels_3HW = pixels_3HW.transpose(1, 2)
        return pixels_3HW.flip([1] * goes_up + [2] * goes_left)
    # As elements of three bytes: moving pixels takes half the time of moving channels.
    pixels_HW = pixels_3HW.permute(1, 2, 0).numpy().view("V3")[..., 0]
    if has_columns_first:
        pixels_HW = pixels_HW.T
    pixels_HW = pixels_HW[:: -1 if goes_up else 1, :: -1 if goes_left else 1]
    upright_HW3 = np.ascontiguousarray(pixels_HW).view(np.uint8).reshape(*pixels_HW.shape, 3)
    return torch.from_numpy(upright_HW3).permute(2, 0, 1)


class _CountedReader(io.BytesIO):
    """Stops a parser that takes the file in too many pieces."""

    _num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_reads += 1
        if self._num_reads > _MAX_READS:
            raise UndecodableImageError(
                f"the file is cut into more than {_MAX_READS} pieces; save the image again"
            )
        return super().read(size)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(_CountedReader(data), formats=_FORMATS)
    except ImageError:
        raise
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
