"""Request bodies of raw pixels, for pipelines that hold images already: npy and safetensors.

Dimension key: B = images, H, W = height and width in pixels.
"""

import hashlib
import io
import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import MalformedPixelsError, TooManyImagesError

_WANTED = "send one uint8 array [B, H, W, 3] in RGB, or [H, W, 3]"
_TENSOR = "images"
_MAX_HEADER_BYTES = 65536
_MAX_SHOWN = 200  # characters of what came, in a message
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # the same but for names of fields
}


class Pixels(NamedTuple):
    """An image that came as pixels."""

    rgb_HW3: npt.NDArray[np.uint8]  # a view of the body

    @property
    def digest(self) -> bytes:
        """SHA-256 of shape and pixels."""
        found = hashlib.sha256(f"pixels {self.rgb_HW3.shape}\n".encode())
        found.update(self.rgb_HW3.data)
        return found.digest()


def read_npy(body: bytes, *, max_images: int | None = None) -> list[Pixels]:
    """The images of an npy file.

    Raises:
        MalformedPixelsError: it is none, or its array is no batch of images.
        TooManyImagesError: more than `max_images`.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"its version is {version[0]}.{version[1]}")
        header = _READERS[version](file)
    except Exception as error:  # a damaged header makes its parser raise anything
        said = str(error)[:_MAX_SHOWN] or type(error).__name__
        raise MalformedPixelsError(f"the body is no npy file ({said}); {_WANTED}") from error
    shape, is_fortran, dtype = header
    if is_fortran:
        raise MalformedPixelsError(
            "the array is in Fortran order; send np.ascontiguousarray(images)"
        )
    return _images(body, file.tell(), shape, str(dtype), max_images)


def read_safetensors(body: bytes, *, max_images: int | None = None) -> list[Pixels]:
    """The images of a safetensors file: its tensor `images`.

    Raises:
        MalformedPixelsError: it is none, or the tensor is no batch of images.
        TooManyImagesError: more than `max_images`.
    """
    length = struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(body) - 8):
        raise MalformedPixelsError(
            f"the body is no safetensors file: its header has {length} bytes, 2 to "
            f"{_MAX_HEADER_BYTES} are allowed; {_WANTED}"
        )
    try:
        header = orjson.loads(body[8 : 8 + length])
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (orjson.JSONDecodeError, AttributeError) as error:
        raise MalformedPixelsError(f"the safetensors header is no JSON object: {error}") from error
    if list(tensors) != [_TENSOR]:
        raise MalformedPixelsError(
            f"the file has the tensors {str(sorted(tensors)[:4])[:_MAX_SHOWN]}; send one, named "
            f"{_TENSOR!r}"
        )
    shape, offsets, dtype = _entry(tensors[_TENSOR])
    data = 8 + length
    if offsets != [0, len(body) - data]:
        raise MalformedPixelsError(
            f"the tensor has the bytes {offsets} and the file [0, {len(body) - data}]; send the "
            "whole file with nothing else in it"
        )
    return _images(body, data, shape, dtype, max_images)


def _entry(entry: Any) -> tuple[tuple[int, ...], list[int], str]:
    try:
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], str(entry["dtype"])[:20]
    except (KeyError, TypeError) as error:
        raise MalformedPixelsError(
            f"the safetensors header does not describe {_TENSOR!r}: {error!r}"
        ) from error
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise MalformedPixelsError(
                f"the safetensors header has {str(numbers)[:_MAX_SHOWN]} where a list of whole "
                "numbers is wanted"
            )
    return tuple(shape), offsets, "uint8" if dtype == "U8" else dtype


def _images(
    body: bytes, start: int, shape: tuple[int, ...], dtype: str, max_images: int | None
) -> list[Pixels]:
    """Images of an array that takes up the rest of the body."""
    if dtype != "uint8" or len(shape) not in (3, 4) or shape[-1] != 3:
        raise MalformedPixelsError(f"the array is {dtype[:20]} {_shown(shape)}; {_WANTED}")
    if min(shape) < 1:
        raise MalformedPixelsError(f"the array {_shown(shape)} is empty; {_WANTED}")
    if math.prod(shape) != len(body) - start:
        raise MalformedPixelsError(
            f"the body has {len(body) - start} bytes for an array {_shown(shape)}, which needs "
            "height * width * 3 for each image; send the whole file with nothing after it"
        )
    num_images = math.prod(shape[:-3])
    if max_images is not None and num_images > max_images:
        raise TooManyImagesError(
            f"the request has {num_images} images, {max_images} are allowed; send them in several "
            "requests"
        )
    array = np.frombuffer(body, np.uint8, offset=start)
    return [Pixels(image) for image in array.reshape(-1, *shape[-3:])]


def _shown(shape: tuple[int, ...]) -> str:
    """A shape in a message, however many and long its numbers are."""
    # In hexadecimal where they are longer than Python writes out in decimal.
    sides = [str(side) if abs(side) < 2**64 else hex(side)[:20] + "..." for side in shape[:6]]
    return f"[{', '.join(sides)}]"
