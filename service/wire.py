"""Responses: the bytes of finished images in each format, without copies of the tensors.

Safetensors is the format with everything in it; frames are one safetensors file per image, sent as
soon as it is done. npy, raw bytes and PNG carry one array, with what they cannot hold in headers.
"""

import base64
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from backbone.preprocess import patch_affine
from service.errors import InvalidOptionError, ResponseTooLargeError, ServiceError
from service.finishing import FinishedImage, NamedPart
from service.models import ServedModel
from service.negotiation import MediaType
from service.options import Dtype, FeatureOptions

MAX_JSON_VALUES = 1_000_000
_JOIN_BYTES = 512 * 1024
# Images that the header x-features describes: more would be more than clients take in a header.
_MAX_DESCRIBED = 8
_DTYPES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
_VALUE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# What numpy calls them; it has no bfloat16.
_NUMPY_DTYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.int8: "|i1"}

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class ImageAnswer:
    """An image that succeeded."""

    index: int
    image: FinishedImage
    original: tuple[int, int]  # (H, W) px
    resized: tuple[int, int]  # (h, w) px
    num_boxes: int | None


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """An image that failed, for a request that wants the others all the same."""

    index: int
    error: ServiceError

    def describe(self) -> dict[str, Any]:
        detail = {
            "code": self.error.code,
            "message": self.error.message,
            "retryable": self.error.retryable,
            "index": self.index,
        }
        return {"index": self.index, "error": detail}


Answer = ImageAnswer | ImageFailure


@dataclass(frozen=True, slots=True)
class Source:
    """What the features of a response have in common."""

    model: ServedModel
    layers: tuple[int, ...]  # block numbers, counted from 0
    options: FeatureOptions

    def describe(self) -> dict[str, object]:
        """What is said about all images, as JSON."""
        encoder, options = self.model.encoder, self.options
        described: dict[str, object] = {
            "model": self.model.name,
            "model_digest": encoder.digest,
            "patch_size": encoder.patch_size,
            "layers": self.layers,
            "dtype": options.dtype,
            "layout": options.layout,
            "normalize": options.normalize,
        }
        if options.boxes is not None:
            described["box_size"] = options.box_size
        if options.pool != "none":
            described["pool"] = options.pool
        if options.project is not None:
            described["project"] = options.project
        return described

    def describe_image(self, answer: Answer) -> dict[str, object]:
        """What is said about one image, as JSON."""
        if isinstance(answer, ImageFailure):
            return answer.describe()
        image = answer.image
        patch_size = self.model.encoder.patch_size
        affine = patch_affine(answer.original, answer.resized, patch_size)
        pool_h, pool_w = image.pool
        described: dict[str, object] = {
            "index": answer.index,
            "grid": image.grid,
            "original_size": answer.original,
            "resized_to": answer.resized,
            "bucket": f"{answer.resized[0]}x{answer.resized[1]}",
            "affine": [[value / pool_w for value in affine[0]], [v / pool_h for v in affine[1]]],
        }
        if answer.num_boxes is not None:
            described["num_boxes"] = answer.num_boxes
        return described

    def name(self, part: NamedPart, index: int) -> str:
        """`features.0`, `features.0.layer11` with several layers, `features.0.layer11.scale`."""
        kind = "features" if part.kind == "scale" else part.kind
        layer = f".layer{self.layers[part.layer]}" if len(self.layers) > 1 else ""
        return f"{kind}.{index}{layer}" + (".scale" if part.kind == "scale" else "")


def check_format(
    media: MediaType, options: FeatureOptions, *, num_images: int, num_layers: int
) -> None:
    """Refuse early what a format cannot hold.

    Raises:
        InvalidOptionError: more than one array, or one of a kind that the format does not have.
    """
    if media in ("application/x-safetensors", "application/x-refinery-frames", "application/json"):
        return
    other = "ask for Accept: application/x-safetensors"
    if num_layers > 1:
        raise InvalidOptionError(
            f"{num_layers} layers do not fit one {_short(media)}; ask for one layer, or {other}"
        )
    if options.include or options.project is not None:
        name = "include" if options.include else "project"
        raise InvalidOptionError(
            f"option {name!r} gives several tensors, and {_short(media)} holds one; {other}"
        )
    if options.partial:
        raise InvalidOptionError(
            f"option 'partial' lists errors per image, which {_short(media)} cannot; {other}"
        )
    if options.dtype == "int8":
        raise InvalidOptionError(
            f"dtype int8 has scales, which {_short(media)} cannot hold; {other}"
        )
    if options.dtype == "bfloat16" and media == "application/x-npy":
        raise InvalidOptionError(
            f"npy has no bfloat16; ask for dtype float16 or float32, or {other}"
        )
    if media == "image/png":
        if num_images > 1:
            raise InvalidOptionError(f"a picture shows one image, not {num_images}; send one")
        for name, is_given in (
            ("boxes", options.boxes is not None),
            ("pool", options.pool == "mean"),
        ):
            if is_given:
                raise InvalidOptionError(f"a picture shows patches; leave out option {name!r}")


def check_response_size(
    media: MediaType,
    num_values: int,
    options: FeatureOptions,
    *,
    num_images: int,
    max_bytes: int,
) -> None:
    """Refuse what would take too much memory, and text for what only binary formats carry well.

    Args:
        num_values: Of the features, and of what is included beside them.
        num_images: Images that they are of; frames are made one by one.
        max_bytes: Most bytes of features that are in memory at once.

    Raises:
        ResponseTooLargeError: more values than are sent at once, or than JSON is sent with.
    """
    num_bytes = num_values * _VALUE_BYTES[options.dtype]
    if media == "application/x-refinery-frames":
        num_bytes //= max(num_images, 1)
    if num_bytes > max_bytes:
        raise ResponseTooLargeError(
            f"the features are {num_bytes} bytes and {max_bytes} are allowed; ask for fewer images "
            "or layers at once, a smaller size or dtype, or Accept: application/x-refinery-frames"
        )
    if media == "application/json" and num_values > MAX_JSON_VALUES:
        less = "a smaller size" if options.boxes is None else "fewer boxes or a smaller box_size"
        raise ResponseTooLargeError(
            f"the features are {num_values} values and JSON is limited to {MAX_JSON_VALUES}; "
            f"ask for Accept: application/x-safetensors, or for {less}"
        )


def serialise(
    media: MediaType, answers: Sequence[Answer], source: Source
) -> tuple[list[Part], dict[str, str]]:
    """The body in parts that are sent one after the other, and headers that go with it.

    Raises:
        InvalidOptionError: images that one array cannot hold.
    """
    headers: dict[str, str] = {}
    if media == "application/x-safetensors":
        parts = _safetensors(answers, source)
    elif media == "application/json":
        parts = _json(answers, source)
    else:
        parts, headers = _single_array(media, answers, source)
    # A system call per part costs more than copying a small answer into one.
    joined: list[Part] = [b"".join(parts)] if sum(map(len, parts)) < _JOIN_BYTES else parts
    return joined, headers


def frame(answer: Answer, source: Source) -> list[Part]:
    """One frame of `application/x-refinery-frames`: its length, then a safetensors file."""
    parts = _safetensors([answer], source, {"index": str(answer.index)})
    return [struct.pack("<Q", sum(map(len, parts))), *parts]


def _bytes(tensor: Tensor) -> memoryview:
    """Its memory; of a tensor without elements too."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _safetensors(
    answers: Sequence[Answer], source: Source, more: Mapping[str, str] | None = None
) -> list[Part]:
    metadata = {key: _text(value) for key, value in source.describe().items()}
    metadata["images"] = _text([source.describe_image(answer) for answer in answers])
    metadata |= more or {}
    for answer in answers:
        if isinstance(answer, ImageFailure) and more is not None:
            metadata["error"] = _text(answer.describe()["error"])
    header: dict[str, object] = {"__metadata__": metadata}
    tensors = [
        (source.name(part, answer.index), part.tensor)
        for answer in answers
        if isinstance(answer, ImageAnswer)
        for part in answer.image.parts
    ]
    parts: list[Part] = []
    offset = 0
    # The widest numbers first: then each tensor begins on a whole number of its values.
    for name, tensor in sorted(tensors, key=lambda item: -item[1].element_size()):
        data = _bytes(tensor)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": (offset, offset + len(data)),
        }
        offset += len(data)
        parts.append(data)
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # readers map the tensors: keep them aligned
    return [struct.pack("<Q", len(text)) + text, *parts]


def _single_array(
    media: MediaType, answers: Sequence[Answer], source: Source
) -> tuple[list[Part], dict[str, str]]:
    """One array [images, *layout] of equal images; with boxes as many for each image."""
    tensors = [
        answer.image.parts[0].tensor for answer in answers if isinstance(answer, ImageAnswer)
    ]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise InvalidOptionError(
            f"features of {len(shapes)} shapes do not fit one {_short(media)}; give a size of "
            "[height, width] and as many boxes for each image, or ask for "
            "Accept: application/x-safetensors"
        )
    options = source.options
    # nchw arrays bring their image axis with them.
    has_image_axis = options.layout == "nchw" and options.boxes is None and options.pool != "mean"
    (shape,) = shapes
    whole = (len(tensors), *(shape[1:] if has_image_axis else shape))
    headers = {"x-shape": ",".join(map(str, whole)), "x-dtype": options.dtype}
    if len(answers) <= _MAX_DESCRIBED:
        headers["x-features"] = _text([source.describe_image(answer) for answer in answers])
    data: list[Part] = [_bytes(tensor) for tensor in tensors]
    if media == "application/octet-stream":
        return data, headers
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file,
        {"descr": _NUMPY_DTYPES[tensors[0].dtype], "fortran_order": False, "shape": whole},
    )
    return [file.getvalue(), *data], headers


def _json(answers: Sequence[Answer], source: Source) -> list[Part]:
    images = []
    for answer in answers:
        described = source.describe_image(answer)
        if isinstance(answer, ImageAnswer):
            for part in answer.image.parts:
                encoded = {
                    "layer": source.layers[part.layer],
                    "shape": tuple(part.tensor.shape),
                    "dtype": _DTYPES[part.tensor.dtype],
                    "data": base64.b64encode(_bytes(part.tensor)).decode("ascii"),
                }
                listed = described.setdefault(part.kind, [])
                assert isinstance(listed, list)
                listed.append(encoded)
        images.append(described)
    return [orjson.dumps({**source.describe(), "images": images})]


def _text(value: object) -> str:
    """A value of safetensors' metadata, which is text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _short(media: MediaType) -> str:
    return media.split("/")[1].removeprefix("x-")
