"""Bodies of `POST /features`: whichever form carries the images at hand without changing them."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import orjson

from service.client.images import Encoded, Payload, Pixels

Box = Sequence[float]
Layout = Literal["grid", "tokens", "nchw"]
Dtype = Literal["float16", "float32", "bfloat16", "int8"]


class FeatureOptions(TypedDict, total=False):
    """What to ask for; what is left out is as the service has it by default (see its /docs)."""

    size: int | tuple[int, int]
    """Longest side, or (height, width); pixels, whole patches."""
    layers: Sequence[int]
    dtype: Dtype
    layout: Layout
    normalize: bool
    box_size: int
    pool: Literal["none", "mean"] | int
    project: int
    include: Sequence[Literal["registers", "cls", "spurious"]]
    register_width: int
    cache: Literal["default", "bypass", "refresh"]
    model: str


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a request."""

    index: int  # of the call
    payload: Payload
    boxes: Sequence[Box] | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body, and the options that go beside it."""

    content: bytes
    content_type: str
    params: dict[str, str]


def make_body(items: Sequence[Item], options: Mapping[str, object]) -> Body:
    """One encoded file goes as it is, pixels of one size as safetensors, all else as multipart.

    Boxes may be very many, too many for a URL: they always go as multipart.
    """
    payloads = [item.payload for item in items]
    if all(item.boxes is None for item in items):
        params = {name: _query_text(value) for name, value in options.items()}
        first = payloads[0]
        if isinstance(first, Encoded) and len(payloads) == 1:
            return Body(bytes(first.data), "application/octet-stream", params)
        pixels = [payload for payload in payloads if isinstance(payload, Pixels)]
        if len(pixels) == len(payloads) and len({item.size for item in pixels}) == 1:
            return Body(_safetensors(pixels), "application/x-safetensors", params)
        return _multipart(payloads, options)
    boxes = [item.boxes if item.boxes is not None else [] for item in items]
    return _multipart(payloads, {**options, "boxes": boxes})


def _query_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def _safetensors(images: Sequence[Pixels]) -> bytes:
    """One tensor `images`, uint8 [B, H, W, 3]."""
    num_bytes = sum(image.num_bytes for image in images)
    shape = (len(images), *images[0].array_HW3.shape)
    header = json.dumps(
        {"images": {"dtype": "U8", "shape": shape, "data_offsets": (0, num_bytes)}}
    ).encode()
    header += b" " * (-len(header) % 8)
    parts = [len(header).to_bytes(8, "little"), header]
    return b"".join([*parts, *(image.array_HW3.data for image in images)])


def _multipart(payloads: Sequence[Payload], options: Mapping[str, object]) -> Body:
    boundary = secrets.token_hex(16)
    parts: list[bytes | bytearray | memoryview] = []
    if options:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="options"\r\n'
        head += "Content-Type: application/json\r\n\r\n"
        parts += [head.encode(), orjson.dumps(options, option=orjson.OPT_SERIALIZE_NUMPY), b"\r\n"]
    for number, payload in enumerate(payloads):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; '
        head += f'filename="{number}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        data = payload.data if isinstance(payload, Encoded) else payload.as_png()
        parts += [head.encode(), data, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return Body(b"".join(parts), f"multipart/form-data; boundary={boundary}", {})
