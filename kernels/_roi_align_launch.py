"""Launchers of the ROI-align kernels: functions of tensors, capturable in a CUDA graph.

(Where images have different numbers of boxes, or boxes lie on the CPU, they copy from there.)

Dimension key: that of `kernels.roi_align`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels._roi_align_device import (
    backward_kernel,
    forward_kernel,
    normalize_backward_kernel,
    tables_kernel,
)
from kernels.heads import is_aligned, split_width
from kernels.tiles import tiles
from kernels.window import TokenWindow


class _Tables(NamedTuple):
    """What the kernels know of the boxes; see `tables_kernel`."""

    weights: Tensor
    cells: Tensor
    bins: Tensor
    image_R: Tensor
    first_box: Tensor


def _launch_tables(
    boxes_R4: Tensor,
    *,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
    device: torch.device,
) -> _Tables:
    boxes_R4 = boxes_R4.to(device, torch.float32, non_blocking=True).contiguous()
    (height, width), (rows, columns) = window.grid, output_size
    num_rois, num_images = len(boxes_R4), len(num_boxes)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    tables = _Tables(
        weights=empty(num_rois, rows * height + columns * width, dtype=torch.float32),
        cells=empty(num_rois, rows + columns, 2, dtype=torch.int32),
        bins=empty(num_rois, height + width, 2, dtype=torch.int32),
        image_R=empty(num_rois, dtype=torch.int32),
        first_box=_first_box(num_boxes, device),
    )
    num_cells = max(height, width)
    tables_kernel[(num_rois, 2)](
        boxes_R4,
        tables.first_box,
        tables.weights,
        tables.cells,
        tables.bins,
        tables.image_R,
        num_images,
        height,
        width,
        rows,
        columns,
        BLOCK_IMAGES=triton.next_power_of_2(num_images),
        BLOCK_CELLS=triton.next_power_of_2(num_cells),
        # A product rounded once instead of twice could add a sample to a bin.
        enable_fp_fusion=False,
        **tiles("roi_align_tables", device, cells=num_cells),
    )
    return tables


def _first_box(num_boxes: Sequence[int], device: torch.device) -> Tensor:
    """Offsets of the images' boxes, `[B + 1]`: made on the device where images have as many."""
    each, num_rois = num_boxes[0], sum(num_boxes)
    if all(number == each for number in num_boxes):
        return torch.arange(0, num_rois + 1, each, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, *accumulate(num_boxes)], dtype=torch.int32)
    return offsets.to(device, non_blocking=True)


def launch_roi_align(
    tokens_BNC: Tensor,
    boxes_R4: Tensor,
    *,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`rois [R, P, C]`, and with `normalize` the lengths `[R, P]` that they had (else nothing)."""
    (height, width), (rows, columns) = window.grid, output_size
    num_rois, channels, device = len(boxes_R4), tokens_BNC.shape[2], tokens_BNC.device
    rois_RPC = tokens_BNC.new_empty((num_rois, rows * columns, channels), dtype=dtype)
    norms_RP = tokens_BNC.new_empty(
        (num_rois, rows * columns) if normalize else (0,), dtype=torch.float32
    )
    if rois_RPC.numel() == 0:
        return rois_RPC, norms_RP
    tables = _launch_tables(
        boxes_R4, num_boxes=num_boxes, window=window, output_size=output_size, device=device
    )
    settings = tiles("roi_align_forward", device, channels=channels, bins=num_rois * rows * columns)
    canvas_width = width + 2 * window.border
    blocks = triton.cdiv(columns, settings["NUM_BINS"])
    forward_kernel[(num_rois * rows * blocks,)](
        tokens_BNC,
        tables.weights,
        tables.cells,
        tables.image_R,
        rois_RPC,
        norms_RP,
        *tokens_BNC.stride(),
        window.prefix + window.border * (canvas_width + 1),
        canvas_width,
        height,
        width,
        rows,
        columns,
        NORMALIZE=normalize,
        **_channel_tiles(channels, settings["num_warps"]),
        ALIGNED=is_aligned(*tokens_BNC.stride()[:2]),
        enable_fp_fusion=True,
        **settings,
    )
    return rois_RPC, norms_RP


def launch_roi_align_backward(
    gradient_RPC: Tensor,
    boxes_R4: Tensor,
    *,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the tokens, `[B, N, C]`."""
    (height, width), (rows, columns) = window.grid, output_size
    num_images, channels = len(num_boxes), gradient_RPC.shape[2]
    shape = (num_images, window.num_tokens, channels)
    if gradient_RPC.numel() == 0:
        return gradient_RPC.new_zeros(shape, dtype=dtype)
    device = gradient_RPC.device
    tables = _launch_tables(
        boxes_R4, num_boxes=num_boxes, window=window, output_size=output_size, device=device
    )
    settings = tiles("roi_align_backward", device, channels=channels)
    token_gradient_BNC = gradient_RPC.new_empty(shape, dtype=dtype)
    backward_kernel[(num_images * window.num_tokens,)](
        gradient_RPC,
        tables.weights,
        tables.bins,
        tables.first_box,
        token_gradient_BNC,
        *gradient_RPC.stride(),
        window.prefix,
        window.border,
        window.num_tokens,
        height,
        width,
        rows,
        columns,
        **_channel_tiles(channels, settings["num_warps"]),
        ALIGNED=is_aligned(*gradient_RPC.stride()[:2]),
        enable_fp_fusion=True,
        **settings,
    )
    return token_gradient_BNC


def launch_normalize_backward(gradient_RPC: Tensor, units_RPC: Tensor, norms_RP: Tensor) -> Tensor:
    """Gradient of the vectors that were scaled to unit length, float32."""
    num_rois, num_bins, channels = units_RPC.shape
    settings = tiles("roi_align_normalize_backward", units_RPC.device, channels=channels)
    result_RPC = torch.empty_like(units_RPC, dtype=torch.float32)
    if result_RPC.numel():
        normalize_backward_kernel[(num_rois * num_bins,)](
            gradient_RPC,
            units_RPC,
            norms_RP,
            result_RPC,
            *gradient_RPC.stride(),
            num_bins,
            **_channel_tiles(channels, settings["num_warps"]),
            ALIGNED=is_aligned(*gradient_RPC.stride()[:2]),
            enable_fp_fusion=True,
            **settings,
        )
    return result_RPC


def _channel_tiles(channels: int, num_warps: int) -> dict[str, int]:
    """Two tiles that cover the channels, none so small that a thread loads less than 16 bytes."""
    smallest = 8 * 32 * num_warps
    first, second = split_width(channels)
    if second == 0 or smallest >= first:
        first, second = max(triton.next_power_of_2(channels), smallest), 0
    return {
        "NUM_CHANNELS": channels,
        "BLOCK_C0": first,
        "BLOCK_C1": max(second, smallest) if second else 0,
    }
