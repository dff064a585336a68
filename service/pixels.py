"""Request bodies of raw pixels, for pipelines that hold images already: npy and safetensors.

Dimension key: B = images, H, W = height and width in pixels.
"""

import hashlib
import io
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import MalformedPixelsError

_WANTED = "send one uint8 array [B, H, W, 3] in RGB, or [H, W, 3]"
_TENSOR = "images"
_MAX_HEADER_BYTES = 65536


class Pixels(NamedTuple):
    """An image that came as pixels."""

    rgb_HW3: npt.NDArray[np.uint8]  # a view of the body

    @property
    def digest(self) -> bytes:
        """SHA-256 of shape and pixels."""
        found = hashlib.sha256(f"pixels {self.rgb_HW3.shape}\n".encode())
        found.update(self.rgb_HW3.data)
        return found.digest()


def read_npy(body: bytes) -> list[Pixels]:
    """The images of an npy file.

    Raises:
        MalformedPixelsError: it is none, or its array is no batch of images.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        else:
            header = np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # a damaged header makes its parser raise anything
        raise MalformedPixelsError(f"the body is no npy file ({error}); {_WANTED}") from error
    shape, is_fortran, dtype = header
    if is_fortran:
        raise MalformedPixelsError(
            "the array is in Fortran order; send np.ascontiguousarray(images)"
        )
    return _images(body, file.tell(), len(body), shape, str(dtype))


def read_safetensors(body: bytes) -> list[Pixels]:
    """The images of a safetensors file: its tensor `images`.

    Raises:
        MalformedPixelsError: it is none, or the tensor is no batch of images.
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
            f"the file has the tensors {sorted(tensors)[:4]}; send one, named {_TENSOR!r}"
        )
    shape, start, end, dtype = _entry(tensors[_TENSOR])
    data = 8 + length
    return _images(body, data + start, data + end, shape, dtype)


def _entry(entry: Any) -> tuple[tuple[int, ...], int, int, str]:
    try:
        shape = tuple(int(side) for side in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
        dtype = {"U8": "uint8"}.get(entry["dtype"], str(entry["dtype"])[:20])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MalformedPixelsError(
            f"the safetensors header does not describe {_TENSOR!r}: {error!r}"
        ) from error
    return shape, start, end, dtype


def _images(body: bytes, start: int, end: int, shape: tuple[int, ...], dtype: str) -> list[Pixels]:
    if dtype != "uint8" or len(shape) not in (3, 4) or shape[-1] != 3:
        raise MalformedPixelsError(f"the array is {dtype} {list(shape)[:6]}; {_WANTED}")
    if min(shape) < 1:
        raise MalformedPixelsError(f"the array {list(shape)} is empty; {_WANTED}")
    num_bytes = 1
    for side in shape:
        num_bytes *= side
    if not 0 <= start <= end <= len(body) or end - start != num_bytes:
        raise MalformedPixelsError(
            f"an array {list(shape)} has {num_bytes} bytes and the body has {end - start} for it; "
            "send the whole file"
        )
    array = np.frombuffer(body, np.uint8, count=num_bytes, offset=start)
    return [Pixels(image) for image in array.reshape(-1, *shape[-3:])]
