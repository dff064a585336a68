"""What a caller may give as an image, and how it goes over the wire.

An encoded file (path, or bytes) goes as it is: the service decodes it, applies its EXIF
orientation, and hashes it for its cache. Pixels go as they are, uint8; those of a `PIL.Image`
upright, as the service would make the file upright.

Dimension key: B = images, H, W = pixels.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from service.client.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    ImageInput: TypeAlias = (
        str
        | os.PathLike[str]
        | bytes
        | bytearray
        | memoryview
        | Image.Image
        | npt.NDArray[np.uint8]
        | torch.Tensor
    )

# What PNG holds without loss, so that the service converts it like the same file.
_PNG_MODES = ("1", "L", "LA", "P", "RGBA", "I;16")
# Lossless at any level; the fastest, since the way to the service is usually short.
_PNG_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image file's bytes."""

    data: bytes | bytearray | memoryview

    @property
    def num_bytes(self) -> int:
        """What it adds to a body."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Pixels:
    """RGB pixels, uint8 [H, W, 3], contiguous."""

    array_HW3: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        """What it adds to a body."""
        return self.array_HW3.nbytes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width, _ = self.array_HW3.shape
        return height, width

    def as_png(self) -> bytes:
        """The same pixels as a lossless file."""
        from PIL import Image

        return _png(Image.fromarray(self.array_HW3))


Payload = Encoded | Pixels


def read_image(image: "ImageInput") -> Payload:
    """What is sent for `image`; reads the file if it is a path.

    Raises:
        InputError: a file that cannot be read, or pixels that are not 8-bit RGB.
    """
    if isinstance(image, str | os.PathLike):
        return Encoded(_read_file(Path(image)))
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise _wrong("the image is 0 bytes; give the bytes of a whole image file")
        return Encoded(image)
    if isinstance(image, np.ndarray):
        return _from_numpy(image)
    if _is_torch(image):
        return _from_numpy(_channels_last(image))
    if _is_pil(image):
        return _from_pil(image)
    raise _wrong(
        f"an image is a {type(image).__name__}; give a path, the bytes of an image file, a "
        "PIL.Image, a numpy array or a torch tensor"
    )


def check_is_several(images: object) -> None:
    """Refuse one image where several are wanted: most kinds of image can be iterated over.

    Raises:
        InputError: `images` is one image.
    """
    one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or _is_pil(images)
    if isinstance(images, np.ndarray) or _is_torch(images):
        one = len(images.shape) != 4
    if one:
        raise _wrong(
            f"images is one {type(images).__name__}; give several, such as a list or an array "
            "[B, H, W, 3], or call feature() for one"
        )


def _read_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}", code="unreadable_file"
        ) from error
    if not data:
        raise InputError(f"{path} is empty; give an image file", code="unreadable_file")
    return data


def _is_torch(image: object) -> "TypeGuard[torch.Tensor]":
    # Nobody who has not imported torch has a tensor; importing it here costs seconds.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def _is_pil(image: object) -> "TypeGuard[Image.Image]":
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _from_numpy(array: npt.NDArray[Any]) -> Pixels:
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise _wrong(
            f"pixels are {array.dtype} {shape}; give uint8, 0 to 255, as (pixels * 255).round()"
        )
    if array.ndim == 4:
        raise _wrong(f"an image is a batch {shape}; give a batch by itself, as images")
    if array.ndim != 3 or array.shape[2] != 3:
        raise _wrong(f"pixels are uint8 {shape}; give [H, W, 3], RGB in the last place")
    if not array.size:
        raise _wrong(f"pixels are uint8 {shape}: the image is empty")
    return Pixels(np.ascontiguousarray(array))


def _channels_last(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    """[3, H, W] or [H, W, 3], told apart by where the 3 is."""
    shape = list(tensor.shape)
    if tensor.ndim == 3 and shape[0] == 3 and shape[2] == 3:
        raise _wrong(f"a tensor {shape} may be [3, H, W] or [H, W, 3]; give it as numpy [H, W, 3]")
    if tensor.ndim == 3 and shape[0] == 3:
        tensor = tensor.permute(1, 2, 0)
    elif tensor.ndim != 3 or shape[2] != 3:
        raise _wrong(f"a tensor is {shape}; give uint8 [3, H, W] or [H, W, 3]")
    if "uint8" not in str(tensor.dtype):
        raise _wrong(f"a tensor is {tensor.dtype} {shape}; give uint8, 0 to 255")
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _from_pil(image: "Image.Image") -> Payload:
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError) as error:  # the file is read only now
        raise InputError(
            f"a PIL image cannot be loaded: {error}", code="unreadable_file"
        ) from error
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return _from_numpy(np.asarray(upright))
    if upright.mode in (*_PNG_MODES, "RGB"):
        return Encoded(_png(upright))
    raise _wrong(
        f"a PIL image has mode {upright.mode}; convert it to RGB, or send the file it came from"
    )


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _wrong(message: str) -> InputError:
    return InputError(message, code="invalid_input")
