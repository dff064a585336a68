"""From a model's features to what was asked for: which vectors, which numbers, which shape.

The order is: boxes or patches, pooled, projected, scaled to unit length, converted, laid out. It
is the same for features that were just computed and for those from the cache.

Dimension key: h, w = patch grid (after pooling), N = h * w patch tokens, K = boxes, p = box_size,
V = vectors, C = channels, k = principal components.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone import DenseFeatures
from service.batcher import EncodedLayer
from service.boxes import Regions, align
from service.errors import FeatureOverflowError, InvalidOptionError
from service.maps import FeatureMap
from service.options import Dtype, FeatureOptions, Layout
from service.pictures import principal_components

Kind = Literal["features", "scale", "cls", "registers", "spurious", "basis", "mean"]

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
_INT8_MAX = 127


class NamedPart(NamedTuple):
    """One tensor of an answer."""

    kind: Kind
    layer: int  # its place among the layers asked for
    tensor: Tensor  # contiguous, on the CPU


class FinishedImage(NamedTuple):
    """One image's answer."""

    parts: tuple[NamedPart, ...]
    grid: tuple[int, int]  # after pooling
    pool: tuple[float, float]  # patches that a cell of the grid is high and wide


@torch.inference_mode()
def finish(
    features: FeatureMap, regions: Regions | None, options: FeatureOptions, *, index: int
) -> FinishedImage:
    """Everything that is sent about image `index`.

    Args:
        features: What the model says about it.
        regions: Its boxes, if it has some.
        options: What is asked for.
        index: Of the image in the request.

    Raises:
        FeatureOverflowError: a value is beyond the dtype's range, or not finite.
        InvalidOptionError: more components than the image has patches, or channels.
    """
    parts: list[NamedPart] = []
    grid, pool = features.grid, (1.0, 1.0)
    for number, layer in enumerate(features.layers):
        if regions is not None:
            vectors = _boxes(features, layer, regions)
        else:
            assert layer.tokens_NC is not None
            vectors_VC, grid, pool = pooled(layer.tokens_NC, features.grid, options.pool)
            if options.project is not None:
                vectors_VC, more = _projected(vectors_VC, options.project, number, index)
                parts += more
            if options.normalize:
                vectors_VC = F.normalize(vectors_VC.float(), dim=-1)
            vectors = vectors_VC
        shape = _Shape(options, grid, regions)
        parts += _converted("features", number, vectors, options.dtype, shape, index)
        parts += _included(layer, number, features.grid, options, index)
    return FinishedImage(tuple(parts), grid, pool)


def pooled(
    tokens_NC: Tensor, grid: tuple[int, int], pool: Literal["none", "mean"] | int
) -> tuple[Tensor, tuple[int, int], tuple[float, float]]:
    """Averages of patches, their grid, and how many patches one of its cells is high and wide."""
    if pool == "none" or pool == 1:
        return tokens_NC, grid, (1.0, 1.0)
    if pool == "mean":
        return tokens_NC.float().mean(dim=0, keepdim=True), (1, 1), (float(grid[0]), float(grid[1]))
    maps_1Chw = tokens_NC.float().T.reshape(1, -1, *grid)
    coarse = F.avg_pool2d(maps_1Chw, pool, ceil_mode=True, count_include_pad=False)[0]
    return coarse.flatten(1).T, (coarse.shape[1], coarse.shape[2]), (float(pool), float(pool))


class _Shape(NamedTuple):
    """How vectors are laid out."""

    options: FeatureOptions
    grid: tuple[int, int]
    regions: Regions | None

    def of(self, vectors_VC: Tensor) -> Tensor:
        options = self.options
        if self.regions is not None:
            return _boxes_in_layout(vectors_VC, options.box_size, options.layout)
        if options.pool == "mean":
            return vectors_VC[0]
        return _tokens_in_layout(vectors_VC, self.grid, options.layout)


def _boxes(features: FeatureMap, layer: EncodedLayer, regions: Regions) -> Tensor:
    if features.regions is regions and layer.boxes_VC is not None:
        return layer.boxes_VC  # cut out on the device
    assert layer.tokens_NC is not None
    (rois_VC,) = align(
        DenseFeatures(layer.tokens_NC[None], features.grid, 1, layer.prefix_PC[None]),
        [regions],
    )
    return rois_VC


def _projected(
    vectors_VC: Tensor, project: int, layer: int, index: int
) -> tuple[Tensor, list[NamedPart]]:
    most = min(vectors_VC.shape)
    if project > most:
        raise InvalidOptionError(
            f"option 'project' is {project}; image {index} has {vectors_VC.shape[0]} vectors of "
            f"{vectors_VC.shape[1]} channels: ask for {most} or fewer",
            index=index,
        )
    wide_VC = vectors_VC.float()
    _check_finite(wide_VC, "float32", index)
    scores_Vk, basis_kC, mean_C = principal_components(wide_VC, project)
    return scores_Vk, [NamedPart("basis", layer, basis_kC), NamedPart("mean", layer, mean_C)]


def _included(
    layer: EncodedLayer, number: int, grid: tuple[int, int], options: FeatureOptions, index: int
) -> list[NamedPart]:
    parts: list[NamedPart] = []
    if "cls" in options.include:
        parts += _converted("cls", number, layer.prefix_PC, options.dtype, None, index)
    if "registers" in options.include:
        assert layer.registers_RC is not None
        parts += _converted("registers", number, layer.registers_RC, options.dtype, None, index)
    if "spurious" in options.include:
        assert layer.spurious_N2 is not None
        scores_hw2 = layer.spurious_N2.reshape(*grid, 2)
        parts.append(NamedPart("spurious", number, scores_hw2.contiguous()))
    return parts


def _converted(
    kind: Kind, layer: int, vectors_VC: Tensor, dtype: Dtype, shape: _Shape | None, index: int
) -> list[NamedPart]:
    """The vectors in the dtype and shape asked for; of int8, their scales too."""
    if dtype == "int8":
        # The other kinds are few and small: they stay exact enough, without a scale of their own.
        if kind != "features":
            return _converted(kind, layer, vectors_VC, "float16", shape, index)
        return _quantised(layer, vectors_VC, shape, index)
    converted_VC = vectors_VC.to(_TORCH_DTYPES[dtype])
    _check_finite(converted_VC, dtype, index)
    shaped = shape.of(converted_VC) if shape else converted_VC
    return [NamedPart(kind, layer, shaped.contiguous())]


def _quantised(layer: int, vectors_VC: Tensor, shape: _Shape | None, index: int) -> list[NamedPart]:
    assert shape is not None
    wide_VC = vectors_VC.float()
    _check_finite(wide_VC, "int8", index)
    scale_V1 = wide_VC.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
    # A vector of zeros, as of a box outside of the image, has no scale; any gives zeros.
    scale_V1 = torch.where(scale_V1 > 0, scale_V1, torch.ones_like(scale_V1))
    steps_VC = (wide_VC / scale_V1).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    scales = shape.of(scale_V1)
    # The channel axis is gone, so that a scale has the place of its vector.
    axis = 1 if shape.options.layout == "nchw" and scales.ndim == 4 else -1
    return [
        NamedPart("features", layer, shape.of(steps_VC).contiguous()),
        NamedPart("scale", layer, scales.squeeze(axis).contiguous()),
    ]


def _check_finite(values: Tensor, dtype: Dtype, index: int) -> None:
    if not bool(torch.isfinite(values).all()):
        hint = "ask for dtype float32" if dtype == "float16" else "check the weights"
        raise FeatureOverflowError(
            f"features of image {index} exceed the range of {dtype}; {hint}", index=index
        )


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


def num_values(
    options: FeatureOptions, grid: tuple[int, int], regions: Regions | None, channels: int
) -> int:
    """Values of the features of an image in one layer; `num_more_values` has the others."""
    if regions is not None:
        return regions.num_vectors * channels
    if options.pool == "mean":
        return channels
    factor = 1 if options.pool == "none" else options.pool
    cells = _ceil(grid[0], factor) * _ceil(grid[1], factor)
    return cells * (options.project or channels)


def num_more_values(
    options: FeatureOptions, grid: tuple[int, int], channels: int, *, prefix: int, registers: int
) -> int:
    """Values that come with the features of an image in one layer, scales apart.

    Args:
        prefix: Class and native register tokens of the model.
        registers: Tokens of the register border.
    """
    tokens = prefix * ("cls" in options.include) + registers * ("registers" in options.include)
    if options.project is not None:
        tokens += options.project + 1  # the basis and the mean
    return tokens * channels + 2 * grid[0] * grid[1] * ("spurious" in options.include)


def _ceil(count: int, factor: int) -> int:
    return -(-count // factor)
