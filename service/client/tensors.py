"""Safetensors without copies, and the frames of `application/x-refinery-frames`.

A tensor here is a view of the bytes that arrived. It keeps all of them alive, so who keeps one of
many images for long should copy it.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from service.client.errors import AnswerError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

# NumPy has no bfloat16: its bits are the upper half of a float32's.
_NUMPY_DTYPES: dict[str, str] = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I8": "|i1",
    "U8": "|u1",
}
_TORCH_DTYPES: dict[str, str] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_MAX_FRAME_BYTES = 1 << 34


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it was sent: dtype in the words of safetensors, shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return np.dtype(_NUMPY_DTYPES[self.dtype]).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes

    def as_numpy(self) -> Array:
        """The tensor, without a copy; bfloat16 as float32, which costs one."""
        flat = np.frombuffer(self.data, dtype=_NUMPY_DTYPES[self.dtype])
        if self.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)

    def as_torch(self) -> "torch.Tensor":
        """The tensor, without a copy unless its bytes lie at an odd address."""
        import torch

        dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[self.dtype])
        if not self.data:  # which torch.frombuffer refuses
            return torch.empty(self.shape, dtype=dtype)
        data: memoryview | bytearray = self.data
        if np.frombuffer(data, np.uint8).ctypes.data % self.item_bytes:
            data = bytearray(data)
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)


def parse_safetensors(data: bytearray) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tensors by name, as views of `data`, and the metadata.

    Raises:
        AnswerError: the bytes are not a whole safetensors file.
    """
    view = memoryview(data)
    try:
        (length,) = _LENGTH.unpack_from(view)
        if length > min(len(view) - _LENGTH.size, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in {len(view)} bytes")
        header = orjson.loads(view[_LENGTH.size : _LENGTH.size + length])
        metadata = header.pop("__metadata__", {})
        body = view[_LENGTH.size + length :]
        return {name: _tensor(entry, body) for name, entry in header.items()}, metadata
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnswerError(
            f"the answer is no safetensors: {error}", code="malformed_answer"
        ) from error


def _tensor(entry: Mapping[str, Any], body: memoryview) -> RawTensor:
    start, stop = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"a tensor of dtype {dtype}; known are {', '.join(_NUMPY_DTYPES)}")
    tensor = RawTensor(dtype, shape, body[start:stop])
    if not (0 <= start <= stop <= len(body) and stop - start == tensor.num_bytes):
        raise ValueError(f"a tensor {dtype} {list(shape)} at bytes {start} to {stop}")
    return tensor


class FrameReader:
    """Takes a stream of length-prefixed frames apart, in whatever pieces it comes.

    Attributes:
        is_complete: The frame of length 0, which ends the stream, has come.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._prefix = bytearray()
        self._frame: bytearray | None = None
        self._num_filled = 0

    def feed(self, piece: bytes) -> Iterator[bytearray]:
        """The frames that this piece completes, each in memory of its own.

        Raises:
            AnswerError: bytes after the end, or a length that cannot be.
        """
        rest = memoryview(piece)
        while rest:
            if self.is_complete:
                raise AnswerError("bytes follow the last frame", code="malformed_answer")
            if self._frame is None:
                rest = self._read_length(rest)
                continue
            taken = min(len(rest), len(self._frame) - self._num_filled)
            self._frame[self._num_filled : self._num_filled + taken] = rest[:taken]
            self._num_filled += taken
            rest = rest[taken:]
            if self._num_filled == len(self._frame):
                frame, self._frame = self._frame, None
                yield frame

    def _read_length(self, rest: memoryview) -> memoryview:
        taken = min(len(rest), _LENGTH.size - len(self._prefix))
        self._prefix += rest[:taken]
        if len(self._prefix) == _LENGTH.size:
            (length,) = _LENGTH.unpack(self._prefix)
            self._prefix.clear()
            if length > _MAX_FRAME_BYTES:
                raise AnswerError(f"a frame of {length} bytes", code="malformed_answer")
            self.is_complete = length == 0
            self._frame = bytearray(length) if length else None
            self._num_filled = 0
        return rest[taken:]
