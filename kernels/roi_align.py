"""ROI-align on a grid of tokens.

Dimension key: B = images, K = boxes of an image, R = boxes of all images, those of the first image
first, N = tokens of a sequence (prefix and border included), h, w = rows and columns of the image's
token grid, C = channels, p, q = rows and columns of the output grid, P = p * q.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._roi_align_launch import (
    launch_normalize_backward,
    launch_roi_align,
    launch_roi_align_backward,
)
from kernels._roi_align_reference import (
    axis_weights,
    backward_reference,
    forward_reference,
    normalize_backward_reference,
)
from kernels.dispatch import on_device_of, unsupported_dtype, unsupported_span, use_triton
from kernels.precision import SHORTEST_NORM, check_alike, full_precision, wide_dtype, widen
from kernels.window import TokenWindow

__all__ = ["axis_weights", "roi_align", "roi_align_reference"]


def roi_align(
    tokens_BNC: Tensor,
    boxes: Tensor,
    *,
    grid: tuple[int, int],
    output_size: tuple[int, int],
    border: int = 0,
    num_prefix_tokens: int = 0,
    num_boxes: Sequence[int] | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Resample boxes of a token grid to a common grid.

    The same numbers as `torchvision.ops.roi_align` with `aligned=True` and adaptive sampling
    (boxes that are empty, turned inside out, or partly outside included; a box that is not finite
    gives zeros), with gradients for the tokens, none for the boxes. It takes tokens as a
    transformer gives them. Values and gradients are deterministic, always: every sum is taken in
    one order, without atomics.

    Args:
        tokens_BNC: Prefix tokens, then a canvas in raster order: the image with `border` tokens
            around it. Any strides; computed in float32 at least, whatever autocast says.
        boxes: Normalised `x0, y0, x1, y1` of the image without its border, `[B, K, 4]`, or
            `[R, 4]` with `num_boxes`. Float32 or float64 (16 bits would move boxes by whole cells,
            and are only widened), on any device; a CUDA graph captures it for `[B, K, 4]` on the
            device of the tokens.
        grid: Rows and columns `(h, w)` of the image's tokens.
        output_size: Rows and columns `(p, q)` of the result.
        border: Tokens around the image on each side, which are no part of it: they are sampled as
            what is outside of any image, and get a gradient of zero. So do the prefix tokens.
        num_prefix_tokens: Tokens before the canvas.
        num_boxes: Boxes of each image, B numbers whose sum is R; without it boxes are `[B, K, 4]`.
        normalize: Scale every output vector to unit length, as `F.normalize` does. Zeros stay.
        dtype: Number format of the result, rounded to once; float32 (float64 for float64 tokens)
            by default.

    Returns:
        `rois [R, p * q, C]`, the boxes of the first image first.

    Raises:
        ValueError: the shapes do not go together.

    Source: UniRefiner, arXiv:2605.19622, student crop features; operation of Mask R-CNN,
    arXiv:1703.06870.
    """
    window = TokenWindow(grid, border, num_prefix_tokens)
    boxes_R4, counts = _check(tokens_BNC, boxes, window, output_size, num_boxes)
    wanted = dtype or wide_dtype(tokens_BNC)
    # The gradient of a normalised vector needs it as it was before it was rounded to fewer bits.
    needs_vector = normalize and torch.is_grad_enabled() and tokens_BNC.requires_grad
    computed = torch.promote_types(wanted, wide_dtype(tokens_BNC)) if needs_vector else wanted
    rois_RPC: Tensor = _roi_align(
        tokens_BNC,
        boxes_R4,
        counts,
        [*grid, border, num_prefix_tokens],
        list(output_size),
        normalize,
        computed,
    )[0]
    return rois_RPC.to(wanted)


@full_precision
def roi_align_reference(
    tokens_BNC: Tensor,
    boxes: Tensor,
    *,
    grid: tuple[int, int],
    output_size: tuple[int, int],
    border: int = 0,
    num_prefix_tokens: int = 0,
    num_boxes: Sequence[int] | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What `roi_align` computes, as two matrix products of plain PyTorch; differentiable."""
    window = TokenWindow(grid, border, num_prefix_tokens)
    boxes_R4, counts = _check(tokens_BNC, boxes, window, output_size, num_boxes)
    # Widened as a whole: the gradients of boxes that share a cell are summed in float32.
    rois_RPC = forward_reference(widen(tokens_BNC), boxes_R4, counts, window, output_size)
    if normalize:
        rois_RPC = F.normalize(rois_RPC, dim=-1, eps=SHORTEST_NORM)
    return rois_RPC.to(dtype or rois_RPC.dtype)


def _check(
    tokens_BNC: Tensor,
    boxes: Tensor,
    window: TokenWindow,
    output_size: tuple[int, int],
    num_boxes: Sequence[int] | None,
) -> tuple[Tensor, list[int]]:
    """Boxes as `[R, 4]`, without gradient, and how many each image has."""
    if tokens_BNC.ndim != 3:
        raise ValueError(f"tokens are {tuple(tokens_BNC.shape)}, wanted [images, tokens, channels]")
    check_alike(tokens=tokens_BNC)
    batch, num_tokens, _ = tokens_BNC.shape
    window.check(num_tokens)
    if min(window.grid) < 1:
        raise ValueError(f"grid is {tuple(window.grid)}, wanted one token at least each way")
    if min(output_size) < 1:
        raise ValueError(f"output_size is {tuple(output_size)}, wanted one bin at least each way")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes are {boxes.dtype}, wanted normalised coordinates in float32")
    shape = tuple(boxes.shape)
    if num_boxes is None:
        if len(shape) != 3 or shape[0] != batch or shape[2] != 4:
            raise ValueError(f"boxes are {shape}, wanted [{batch}, boxes, 4]")
        counts = [shape[1]] * batch
    else:
        counts = list(num_boxes)
        if len(counts) != batch or min(counts, default=0) < 0:
            raise ValueError(f"num_boxes is {counts}, wanted {batch} numbers, one of each image")
        if shape != (sum(counts), 4):
            raise ValueError(f"boxes are {shape}, wanted [{sum(counts)}, 4], the sum of num_boxes")
    return widen(boxes.detach()).reshape(-1, 4), counts


def _window(numbers: Sequence[int]) -> TokenWindow:
    height, width, border, prefix = numbers
    return TokenWindow((height, width), border, prefix)


@torch.library.custom_op("refinery::roi_align", mutates_args=())
def _roi_align(
    tokens_BNC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: Sequence[int],
    output_size: Sequence[int],
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`rois [R, P, C]`, and the lengths `[R, P]` that they had before, where they are normalised.

    `window` is rows, columns, border, prefix.
    """
    place, (rows, columns) = _window(window), output_size
    unsupported = unsupported_dtype(tokens_BNC.dtype, dtype) or unsupported_span(tokens_BNC)
    if use_triton("roi_align", tokens_BNC, unsupported=unsupported):
        with on_device_of(tokens_BNC):
            return launch_roi_align(
                tokens_BNC,
                boxes_R4,
                num_boxes=num_boxes,
                window=place,
                output_size=(rows, columns),
                normalize=normalize,
                dtype=dtype,
            )
    rois_RPC = forward_reference(tokens_BNC, boxes_R4, num_boxes, place, (rows, columns))
    norms_RP = rois_RPC.new_empty(0)
    if normalize:
        norms_RP = torch.linalg.vector_norm(rois_RPC, dim=-1)
        rois_RPC /= norms_RP.clamp(min=SHORTEST_NORM)[..., None]
    return rois_RPC.to(dtype), norms_RP


@_roi_align.register_fake
def _(
    tokens_BNC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: Sequence[int],
    output_size: Sequence[int],
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    del num_boxes, window
    num_rois, num_bins = boxes_R4.shape[0], output_size[0] * output_size[1]
    rois_RPC = tokens_BNC.new_empty((num_rois, num_bins, tokens_BNC.shape[2]), dtype=dtype)
    norms_shape = (num_rois, num_bins) if normalize else (0,)
    return rois_RPC, tokens_BNC.new_empty(norms_shape, dtype=wide_dtype(tokens_BNC))


@torch.library.custom_op("refinery::roi_align_backward", mutates_args=())
def _roi_align_backward(
    gradient_RPC: Tensor,
    units_RPC: Tensor | None,
    norms_RP: Tensor | None,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: Sequence[int],
    output_size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the tokens; `units_RPC` and `norms_RP` are there where rois were normalised."""
    place, (rows, columns) = _window(window), output_size
    unsupported = unsupported_dtype(gradient_RPC.dtype, dtype) or unsupported_span(gradient_RPC)
    if use_triton("roi_align", gradient_RPC, unsupported=unsupported):
        with on_device_of(gradient_RPC):
            if units_RPC is not None and norms_RP is not None:
                gradient_RPC = launch_normalize_backward(gradient_RPC, units_RPC, norms_RP)
            return launch_roi_align_backward(
                gradient_RPC,
                boxes_R4,
                num_boxes=num_boxes,
                window=place,
                output_size=(rows, columns),
                dtype=dtype,
            )
    if units_RPC is not None and norms_RP is not None:
        gradient_RPC = normalize_backward_reference(gradient_RPC, units_RPC, norms_RP)
    return backward_reference(gradient_RPC, boxes_R4, num_boxes, place, (rows, columns)).to(dtype)


@_roi_align_backward.register_fake
def _(
    gradient_RPC: Tensor,
    units_RPC: Tensor | None,
    norms_RP: Tensor | None,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: Sequence[int],
    output_size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    del units_RPC, norms_RP, boxes_R4, output_size
    shape = (len(num_boxes), _window(window).num_tokens, gradient_RPC.shape[2])
    return gradient_RPC.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens_BNC, boxes_R4, *settings, normalize, _ = inputs
    rois_RPC, norms_RP = output
    ctx.mark_non_differentiable(norms_RP)
    ctx.save_for_backward(boxes_R4, *((rois_RPC, norms_RP) if normalize else (None, None)))
    ctx.settings, ctx.dtype = settings, tokens_BNC.dtype


def _backward(ctx: Any, gradient_RPC: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    boxes_R4, units_RPC, norms_RP = ctx.saved_tensors
    gradient_BNC = _roi_align_backward(
        gradient_RPC, units_RPC, norms_RP, boxes_R4, *ctx.settings, ctx.dtype
    )
    return gradient_BNC, None, None, None, None, None, None


_roi_align.register_autograd(_backward, setup_context=_setup_context)
