"""What is cached, and its form in bytes, which tells every damage.

Layout: format version (8 bytes), BLAKE2b checksum (16 bytes), then a safetensors file. The checksum
covers the key too, so a value that lies under a wrong key is refused like a damaged one.
"""

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import orjson
import torch
from torch import Tensor

FORMAT = b"VRCACHE\x01"  # the last byte is the version
CHECKSUM_BYTES = 16
_PREFIX_BYTES = len(FORMAT) + CHECKSUM_BYTES
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"

# What reading a safetensors file raises that is none.
_MALFORMED = (
    AttributeError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class CorruptEntryError(Exception):
    """The bytes are not what `dump` wrote under this key."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Features of one image with what is needed to answer from them.

    Readers share the tensors: nobody may write to them once the entry is in a cache.

    Raises:
        ValueError: a tensor is not on the CPU, or is not float32, bfloat16 or float16; a name or
            text cannot be written as UTF-8.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.device.type != "cpu" or tensor.dtype not in _NAMES or name == _METADATA:
                raise ValueError(
                    f"tensor {name!r} is {tensor.dtype} on {tensor.device}; the cache takes "
                    f"float32, bfloat16 and float16 on the CPU, under any name but {_METADATA!r}"
                )
        for text in (*self.tensors, *self.metadata, *self.metadata.values()):
            text.encode()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors and texts."""
        texts = (*self.tensors, *self.metadata, *self.metadata.values())
        return sum(tensor.nbytes for tensor in self.tensors.values()) + sum(map(len, texts))

    def owning(self) -> "Entry":
        """This entry; tensors that are part of a larger one are copied out of it.

        Otherwise the features of one image would keep those of its whole batch in memory.
        """
        parts = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors.items()
            if tensor.untyped_storage().nbytes() > tensor.nbytes
        }
        return replace(self, tensors=self.tensors | parts) if parts else self


def dump(entry: Entry, key: str) -> bytes:
    """The entry as bytes that only `load` with the same key takes; tensors are copied once."""
    header: dict[str, object] = {_METADATA: entry.metadata}
    # Wide numbers first: then every tensor begins at a whole number of its elements.
    by_width = sorted(entry.tensors, key=lambda name: -entry.tensors[name].element_size())
    starts: dict[str, int] = {}
    end = 0
    for name in by_width:
        starts[name] = end
        end += entry.tensors[name].nbytes
    for name, tensor in entry.tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], starts[name] + tensor.nbytes],
        }
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    body: list[bytes | memoryview] = [_LENGTH.pack(len(text)), text]
    body += [_raw(entry.tensors[name]) for name in by_width]
    return b"".join([FORMAT, _checksum(key, body), *body])


def load(data: bytes | bytearray | memoryview, key: str) -> Entry:
    """The entry that `dump` wrote under this key.

    The tensors are views on memory that can be written to, which nobody may do any more; what is
    read-only is copied once, as PyTorch has no read-only tensors.

    Raises:
        CorruptEntryError: anything else than all that `dump` wrote, and nothing more.
    """
    view = memoryview(data)
    if view[: len(FORMAT)] != FORMAT:
        raise CorruptEntryError(f"it does not begin with {FORMAT!r}: another format or version")
    body = view[_PREFIX_BYTES:]
    if view[len(FORMAT) : _PREFIX_BYTES] != _checksum(key, [body]):
        raise CorruptEntryError("the checksum of key and value is another one")
    try:
        return _parse(memoryview(bytearray(view)) if view.readonly else view)
    except _MALFORMED as error:
        # A checksum is no signature: another program can write a right one over anything.
        raise CorruptEntryError(f"another program wrote it: {error}") from error


def _parse(data: memoryview) -> Entry:
    (length,) = _LENGTH.unpack_from(data, _PREFIX_BYTES)
    begin = _PREFIX_BYTES + _LENGTH.size
    base = begin + length
    header = orjson.loads(data[begin:base])
    metadata = header.pop(_METADATA)
    tensors = {}
    for name, item in header.items():
        first, last = item["data_offsets"]
        shape, dtype = item["shape"], _DTYPES[item["dtype"]]
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last:
            raise ValueError(f"tensor {name!r} has shape {shape} and bytes {first} to {last}")
        tensors[name] = _view(data, base + first, shape, dtype)
    return Entry(tensors, metadata)


def _view(data: memoryview, offset: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(key: str, body: Iterable[bytes | memoryview]) -> bytes:
    name = key.encode()
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES, person=FORMAT)
    checksum.update(_LENGTH.pack(len(name)))
    checksum.update(name)
    for part in body:
        checksum.update(part)
    return checksum.digest()
