"""What the service answers about one image.

Dimension key: H, W = the image in pixels, h, w = patch grid, N = h * w, K = boxes, C = channels,
P, R = class and register tokens, k = principal components.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orjson

from service.client.errors import AnswerError
from service.client.tensors import Array, RawTensor

if TYPE_CHECKING:
    import torch

Part = Literal["features", "scale", "cls", "registers", "spurious", "basis", "mean"]
Affine = tuple[tuple[float, float, float], tuple[float, float, float]]

_TENSOR_NAME = re.compile(
    r"(features|cls|registers|spurious|basis|mean)\.(\d+)(?:\.layer(\d+))?(\.scale)?"
)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of one image and where they lie in it.

    Numbers are torch tensors by attribute (`features`, `cls`, ...) and NumPy arrays by
    `as_numpy`; torch is imported when the first tensor is asked for. With several layers, what
    goes beside the features comes by `as_torch("cls", layer=...)`. int8 features come multiplied
    by their scale, as float32, unless `raw=True`.

    Attributes:
        index: Which image of the call, from 0.
        tensors: Everything that was sent, as it was sent, by layer and part.
        layer_numbers: Blocks that were asked for, counted from 0.
        grid: (h, w) in patches.
        original_size: (H, W) of the upright image, in pixels.
        resized_to: (height, width) that it was encoded at, in pixels.
        bucket: Resolution bucket, as "HxW"; None where the service names none.
        affine: [x_patch, y_patch] = A @ [x, y, 1], pixels of the upright image, edge convention.
        num_boxes: K, when boxes were asked for; else None.
        patch_size: Side of a patch in pixels of the resized image.
        dtype: As sent: float16, float32, bfloat16 or int8.
        layout: grid [h, w, C], tokens [N, C], or nchw [1, C, h, w]; of boxes see the service.
        model: Name of the model.
        model_digest: SHA-256 of its weights.
        cache: Whether the service had them in its cache; None where it does not say.
        request_id: Of the answer.
    """

    index: int
    tensors: Mapping[tuple[int, Part], RawTensor]
    layer_numbers: tuple[int, ...]
    grid: tuple[int, int]
    original_size: tuple[int, int]
    resized_to: tuple[int, int]
    bucket: str | None
    affine: Affine
    num_boxes: int | None
    patch_size: int
    dtype: str
    layout: str
    model: str
    model_digest: str
    cache: Literal["hit", "miss"] | None
    request_id: str | None

    @property
    def features(self) -> "torch.Tensor":
        """Features of the only layer; several are in `layers`.

        Raises:
            ValueError: there are several layers.
        """
        return self.as_torch()

    @property
    def layers(self) -> "dict[int, torch.Tensor]":
        """Features by block number, counted from 0."""
        return {layer: self.as_torch(layer=layer) for layer in self.layer_numbers}

    @property
    def cls(self) -> "torch.Tensor | None":
        """Class tokens [P, C] of the only layer; None unless `include` asked for them."""
        return self._companion("cls")

    @property
    def registers(self) -> "torch.Tensor | None":
        """Register tokens [R, C] of the only layer; None unless `include` asked for them."""
        return self._companion("registers")

    @property
    def spurious(self) -> "torch.Tensor | None":
        """How spurious each patch is, float32 [h, w, 2]; None unless `include` asked for it.

        The largest cosine to a register token, and the z-score of the norm.
        """
        return self._companion("spurious")

    def has(self, part: Part, *, layer: int | None = None) -> bool:
        """Whether that part was sent."""
        return (self._layer(layer), part) in self.tensors

    def as_torch(
        self, part: Part = "features", *, layer: int | None = None, raw: bool = False
    ) -> "torch.Tensor":
        """A part as a tensor, a view of the answer's bytes.

        Args:
            part: Which; `basis` [k, C] and `mean` [C] come with the option `project`.
            layer: Block number; needed when there are several.
            raw: int8 features as they are, without their scale.

        Raises:
            KeyError: that part was not sent.
            ValueError: several layers and none chosen.
        """
        tensor = self._tensor(part, layer).as_torch()
        if part == "features" and self.dtype == "int8" and not raw:
            scale = self._tensor("scale", layer).as_torch()
            return tensor.float() * scale.reshape(self._scale_shape(tuple(tensor.shape)))
        return tensor

    def as_numpy(
        self, part: Part = "features", *, layer: int | None = None, raw: bool = False
    ) -> Array:
        """As `as_torch`, as an array; bfloat16 becomes float32, which NumPy lacks."""
        array = self._tensor(part, layer).as_numpy()
        if part == "features" and self.dtype == "int8" and not raw:
            scale = self._tensor("scale", layer).as_numpy()
            scaled: Array = array.astype(np.float32) * scale.reshape(self._scale_shape(array.shape))
            return scaled
        return array

    def patch_of(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the patch at a position of the upright image, in pixels.

        Raises:
            ValueError: the position is not in the image.
        """
        height, width = self.original_size
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"({x}, {y}) is outside of the image of {width}x{height} px")
        column, row = (float(a) * x + float(b) * y + float(c) for a, b, c in self.affine)
        h, w = self.grid
        # The right and the lower edge belong to the last patch.
        return min(int(row), h - 1), min(int(column), w - 1)

    def pixel_box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) that a patch covers in the upright image, in pixels.

        Raises:
            ValueError: there is no such patch.
        """
        h, w = self.grid
        if not (0 <= row < h and 0 <= column < w):
            raise ValueError(f"no patch ({row}, {column}) on a grid of {h}x{w}")
        (x0, y0), (x1, y1) = self._pixel(column, row), self._pixel(column + 1, row + 1)
        return x0, y0, x1, y1

    def _pixel(self, column: int, row: int) -> tuple[float, float]:
        (a, b, c), (d, e, f) = self.affine
        determinant = a * e - b * d
        x, y = column - c, row - f
        return (e * x - b * y) / determinant, (a * y - d * x) / determinant

    def _companion(self, part: Part) -> "torch.Tensor | None":
        layer = self._layer(None)
        return self.as_torch(part, layer=layer) if (layer, part) in self.tensors else None

    def _tensor(self, part: Part, layer: int | None) -> RawTensor:
        number = self._layer(layer)
        if (number, part) not in self.tensors:
            sent = ", ".join(f"{name} of layer {key}" for key, name in self.tensors)
            raise KeyError(f"no {part} of layer {number}; there are {sent}")
        return self.tensors[number, part]

    def _layer(self, layer: int | None) -> int:
        if layer is not None:
            return layer
        if len(self.layer_numbers) > 1:
            raise ValueError(
                f"there are layers {list(self.layer_numbers)}; use `layers`, or name one as layer="
            )
        return self.layer_numbers[0]

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One scale for each vector: the shape with 1 channel."""
        channels = len(shape) - (3 if self.layout == "nchw" and len(shape) == 4 else 1)
        return (*shape[:channels], 1, *shape[channels + 1 :])


def tensors_by_image(
    tensors: Mapping[str, RawTensor], layer_numbers: tuple[int, ...]
) -> dict[int, dict[tuple[int, Part], RawTensor]]:
    """Tensors of an answer by image, layer and part.

    Raises:
        AnswerError: a tensor whose name says nothing.
    """
    found: dict[int, dict[tuple[int, Part], RawTensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AnswerError(f"the answer has a tensor {name[:80]!r}", code="malformed_answer")
        part, image, layer, is_scale = match.groups()
        key: Part = "scale" if is_scale else part  # type: ignore[assignment]
        number = int(layer) if layer is not None else layer_numbers[0]
        found.setdefault(int(image), {})[number, key] = tensor
    return found


def describe_answer(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `Features` that all images of an answer have in common.

    Raises:
        AnswerError: one is missing or unreadable.
    """
    try:
        return {
            "layer_numbers": tuple(orjson.loads(metadata["layers"])),
            "patch_size": int(metadata["patch_size"]),
            "dtype": metadata["dtype"],
            "layout": metadata["layout"],
            "model": metadata["model"],
            "model_digest": metadata["model_digest"],
        }
    except (KeyError, ValueError) as error:
        raise _unreadable(error) from error


def describe_image(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Features` that an image has of its own.

    Raises:
        AnswerError: one is missing or unreadable.
    """
    try:
        first, second = (tuple(map(float, row)) for row in entry["affine"])
        return {
            "grid": tuple(entry["grid"]),
            "original_size": tuple(entry["original_size"]),
            "resized_to": tuple(entry["resized_to"]),
            "bucket": entry.get("bucket"),
            "affine": (first, second),
            "num_boxes": entry.get("num_boxes"),
            "cache": entry.get("cache"),
        }
    except (KeyError, ValueError, TypeError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> AnswerError:
    return AnswerError(
        f"the answer's metadata cannot be read: {type(error).__name__} {error}",
        code="malformed_answer",
    )
