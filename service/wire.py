"""Responses: which format, which shape and numbers, and the bytes without needless copies.

Dimension key: h, w = patch grid, N = h * w patch tokens, K = boxes of an image, p = box_size,
V = feature vectors that an image is answered with, N or K * p * p, C = channels.
"""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson
import torch
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import Tensor
from torch.nn import functional as F

from backbone.preprocess import patch_affine
from service.errors import (
    FeatureOverflowError,
    InvalidOptionError,
    NotAcceptableError,
    ResponseTooLargeError,
)
from service.schemas import Dtype, FeatureOptions, Layout

MediaType = Literal["application/x-safetensors", "application/x-npy", "application/json"]
MEDIA_TYPES: tuple[MediaType, ...] = (
    "application/x-safetensors",
    "application/x-npy",
    "application/json",
)
MAX_JSON_VALUES = 1_000_000
_JOIN_BYTES = 512 * 1024

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
_SAFETENSORS_DTYPES: dict[Dtype, str] = {"float16": "F16", "float32": "F32"}

Array = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of one image as they are sent, and where they lie in it."""

    arrays: tuple[Array, ...]  # one per layer
    grid: tuple[int, int]
    original: tuple[int, int]  # (height, width) px
    resized: tuple[int, int]  # (height, width) px


@dataclass(frozen=True, slots=True)
class Source:
    """What the features of a response have in common."""

    model: str
    digest: str
    patch_size: int
    layers: tuple[int, ...]  # block numbers, counted from 0


def negotiate(accept: str | None) -> MediaType:
    """The offered format that `Accept` likes best; safetensors when it does not mind.

    Raises:
        NotAcceptableError: it names no format that is offered.
    """
    if not accept:
        return MEDIA_TYPES[0]
    ranges = [_media_range(text) for text in accept.split(",")]
    best: MediaType | None = None
    best_quality = 0.0
    for media in MEDIA_TYPES:
        matching = [item for item in ranges if _covers(item[0], media)]
        # The most specific range decides: `*/*;q=0.1` does not weaken `application/json`.
        quality = max(matching, key=lambda item: -item[0].count("*"))[1] if matching else 0.0
        if quality > best_quality:
            best, best_quality = media, quality
    if best is None:
        raise NotAcceptableError(
            f"Accept is {accept[:80]!r}; this service offers {', '.join(MEDIA_TYPES)}"
        )
    return best


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.lower().startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return media.lower(), quality


def _covers(media_range: str, media: str) -> bool:
    kind, _, subtype = media_range.partition("/")
    return media_range == media or kind in ("*", "application") and subtype == "*"


def check_response_size(media: MediaType, num_values: int, options: FeatureOptions) -> None:
    """Refuse text for what only binary formats carry well.

    Raises:
        ResponseTooLargeError: more values than JSON is sent with.
    """
    if media == "application/json" and num_values > MAX_JSON_VALUES:
        less = "a smaller size" if options.boxes is None else "fewer boxes or a smaller box_size"
        raise ResponseTooLargeError(
            f"the features are {num_values} values and JSON is limited to {MAX_JSON_VALUES}; "
            f"ask for Accept: application/x-safetensors, or for {less}"
        )


def to_array(
    vectors_VC: Tensor, grid: tuple[int, int], options: FeatureOptions, *, index: int
) -> Array:
    """Tokens of image `index`, or vectors of its boxes, in the dtype and layout asked for.

    Those of boxes come normalised if that is asked for; tokens are normalised here.

    Raises:
        FeatureOverflowError: a value is beyond the dtype's range.
    """
    if options.normalize and options.boxes is None:
        vectors_VC = F.normalize(vectors_VC.float(), dim=-1)
    converted_VC = vectors_VC.to(_TORCH_DTYPES[options.dtype])
    if not bool(torch.isfinite(converted_VC).all()):
        hint = "ask for dtype float32" if options.dtype == "float16" else "check the weights"
        raise FeatureOverflowError(
            f"features of image {index} exceed the range of {options.dtype}; {hint}", index=index
        )
    if options.boxes is None:
        shaped = _tokens_in_layout(converted_VC, grid, options.layout)
    else:
        shaped = _boxes_in_layout(converted_VC, options.box_size, options.layout)
    array: Array = shaped.contiguous().numpy()
    return array


def _boxes_in_layout(rois_VC: Tensor, box_size: int, layout: Layout) -> Tensor:
    if box_size == 1:
        return rois_VC
    num_boxes = rois_VC.shape[0] // box_size**2
    if layout == "tokens":
        return rois_VC.reshape(num_boxes, box_size**2, rois_VC.shape[1])
    rois_KppC = rois_VC.reshape(num_boxes, box_size, box_size, rois_VC.shape[1])
    return rois_KppC if layout == "grid" else rois_KppC.permute(0, 3, 1, 2)


def _tokens_in_layout(tokens_NC: Tensor, grid: tuple[int, int], layout: Layout) -> Tensor:
    h, w = grid
    if layout == "tokens":
        return tokens_NC
    if layout == "grid":
        return tokens_NC.reshape(h, w, -1)
    return tokens_NC.T.reshape(1, -1, h, w)


def serialise(
    media: MediaType, images: Sequence[ImageFeatures], options: FeatureOptions, source: Source
) -> list[Part]:
    """The body, in parts that are sent one after the other.

    Raises:
        InvalidOptionError: images that one npy array cannot hold.
    """
    if media == "application/x-safetensors":
        parts = _safetensors(images, options, source)
    elif media == "application/x-npy":
        parts = _npy(images, options, source)
    else:
        parts = _json(images, options, source)
    # A system call per part costs more than copying a small answer into one.
    return [b"".join(parts)] if sum(map(len, parts)) < _JOIN_BYTES else parts


def tensor_name(image: int, layer: int, source: Source) -> str:
    """`features.0`, or `features.0.layer11` when there are several layers; also of boxes."""
    suffix = f".layer{layer}" if len(source.layers) > 1 else ""
    return f"features.{image}{suffix}"


def _describe(image: ImageFeatures, options: FeatureOptions, source: Source) -> dict[str, object]:
    description: dict[str, object] = {
        "grid": image.grid,
        "original_size": image.original,
        "resized_to": image.resized,
        "affine": patch_affine(image.original, image.resized, source.patch_size),
    }
    if options.boxes is not None:
        description["num_boxes"] = len(image.arrays[0])
    return description


def _bytes(array: Array) -> memoryview:
    """Its memory; unlike `array.data.cast("B")` also of an array without elements."""
    return array.reshape(-1).view(np.uint8).data


def _safetensors(
    images: Sequence[ImageFeatures], options: FeatureOptions, source: Source
) -> list[Part]:
    metadata = {
        "model": source.model,
        "model_digest": source.digest,
        "patch_size": str(source.patch_size),
        "layers": orjson.dumps(source.layers).decode(),
        "dtype": options.dtype,
        "layout": options.layout,
        "normalize": "true" if options.normalize else "false",
        "images": orjson.dumps([_describe(image, options, source) for image in images]).decode(),
    }
    if options.boxes is not None:
        metadata["box_size"] = str(options.box_size)
    header: dict[str, object] = {"__metadata__": metadata}
    parts: list[Part] = []
    offset = 0
    for index, image in enumerate(images):
        for layer, array in zip(source.layers, image.arrays, strict=True):
            header[tensor_name(index, layer, source)] = {
                "dtype": _SAFETENSORS_DTYPES[options.dtype],
                "shape": array.shape,
                "data_offsets": (offset, offset + array.nbytes),
            }
            offset += array.nbytes
            parts.append(_bytes(array))
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # readers map the tensors: keep them aligned
    return [struct.pack("<Q", len(text)) + text, *parts]


def _npy(images: Sequence[ImageFeatures], options: FeatureOptions, source: Source) -> list[Part]:
    """One array [images, *layout]; with boxes as many for each image."""
    if len(source.layers) > 1:
        raise InvalidOptionError(
            f"{len(source.layers)} layers do not fit one npy array; ask for one layer, or for "
            "Accept: application/x-safetensors"
        )
    arrays = [image.arrays[0] for image in images]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise InvalidOptionError(
            f"features of {len(shapes)} shapes do not fit one npy array; give a size of "
            "[height, width] and as many boxes for each image, or ask for "
            "Accept: application/x-safetensors"
        )
    # nchw arrays bring their image axis with them.
    has_image_axis = options.layout == "nchw" and options.boxes is None
    shape = arrays[0].shape if has_image_axis else (1, *arrays[0].shape)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head,
        {
            "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
            "fortran_order": False,
            "shape": (len(arrays), *shape[1:]),
        },
    )
    return [head.getvalue(), *(_bytes(array) for array in arrays)]


def _json(images: Sequence[ImageFeatures], options: FeatureOptions, source: Source) -> list[Part]:
    document: dict[str, object] = {
        "model": source.model,
        "model_digest": source.digest,
        "patch_size": source.patch_size,
        "dtype": options.dtype,
        "layout": options.layout,
        "normalize": options.normalize,
        "images": [
            {
                **_describe(image, options, source),
                "features": [
                    {
                        "layer": layer,
                        "shape": array.shape,
                        "data": base64.b64encode(_bytes(array)).decode("ascii"),
                    }
                    for layer, array in zip(source.layers, image.arrays, strict=True)
                ],
            }
            for image in images
        ],
    }
    if options.boxes is not None:
        document["box_size"] = options.box_size
    return [orjson.dumps(document)]


class PartsResponse(Response):
    """A response whose body is sent part by part, without joining the parts first."""

    def __init__(self, parts: Sequence[Part], media_type: str, headers: dict[str, str]) -> None:
        self._parts = parts
        length = sum(len(part) for part in parts)
        super().__init__(headers={**headers, "content-length": str(length)}, media_type=media_type)

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - ASGI's signature
        receive: Receive,  # noqa: ARG002
        send: Send,
    ) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        last = len(self._parts) - 1
        for number, part in enumerate(self._parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < last})
