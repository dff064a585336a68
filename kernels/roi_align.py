"""ROI-align on a grid of tokens, as two matrix products.

Dimension key: B = images, K = boxes of an image, N = h * w tokens in raster order, C = channels,
p, q = rows and columns of the output grid, G = samples of an output bin along one axis,
S = cells of the sampled axis.
"""

import torch
from torch import Tensor

from kernels.precision import full_precision, widen


def axis_weights(
    starts_BK: Tensor,
    ends_BK: Tensor,
    *,
    num_cells: int,
    num_bins: int,
    device: torch.device | None = None,
) -> Tensor:
    """How much each cell of one axis counts in each bin of each box: `weights_BKPS`.

    Bilinear sampling, the test for samples outside the map, the clamping at its rim and the number
    of samples per bin (one for every cell that a bin spans, rounded up) are all decided axis by
    axis in ROI-align, so the whole operation is a product of one such matrix per axis.

    Args:
        starts_BK, ends_BK: Sides of the boxes as shares of the axis, 0 to 1. Float32 or float64:
            16-bit coordinates would move boxes by whole pixels. Boxes on the CPU cost no waiting
            for an accelerator: the largest G is needed as a number.
        num_cells: Length S of the sampled axis.
        num_bins: Length P of the output axis.
        device: Where the weights are wanted; that of the boxes by default.

    Returns:
        `weights_BKPS`. Rows of a box that is empty or turned inside out are zero.
    """
    starts_BK, ends_BK = starts_BK * num_cells - 0.5, ends_BK * num_cells - 0.5
    bin_size_BK = (ends_BK - starts_BK) / num_bins
    num_samples_BK = bin_size_BK.ceil().clamp(min=0)
    largest = int(num_samples_BK.max()) if num_samples_BK.numel() else 0
    starts_BK, bin_size_BK, num_samples_BK = (
        tensor.to(device) for tensor in (starts_BK, bin_size_BK, num_samples_BK)
    )

    bins_P1 = torch.arange(num_bins, device=starts_BK.device, dtype=starts_BK.dtype)[:, None]
    samples_G = torch.arange(largest, device=starts_BK.device, dtype=starts_BK.dtype)
    step_BK = bin_size_BK / num_samples_BK.clamp(min=1)
    positions_BKPG = (
        starts_BK[..., None, None]
        + bins_P1 * bin_size_BK[..., None, None]
        + (samples_G + 0.5) * step_BK[..., None, None]
    )
    # One cell beyond the rim still counts, as the rim itself; further out a sample is zero, but it
    # stays in the average.
    is_counted_BKPG = (
        (positions_BKPG >= -1)
        & (positions_BKPG <= num_cells)
        & (samples_G < num_samples_BK[..., None, None])
    )
    positions_BKPG = positions_BKPG.clamp(0, num_cells - 1)

    cells_S = torch.arange(num_cells, device=starts_BK.device, dtype=starts_BK.dtype)
    hats_BKPGS = (1 - (positions_BKPG[..., None] - cells_S).abs()).clamp(min=0)
    hats_BKPGS = hats_BKPGS * is_counted_BKPG[..., None]
    return hats_BKPGS.sum(dim=-2) / num_samples_BK.clamp(min=1)[..., None, None]


@full_precision
def roi_align(
    tokens_BNC: Tensor, boxes_BK4: Tensor, *, grid: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Resample boxes of a token grid to a common grid.

    The same numbers as `torchvision.ops.roi_align` with `aligned=True` and adaptive sampling
    (boxes that are empty, turned inside out, or partly outside included), with gradients for the
    tokens, none for the boxes. It takes tokens as a transformer gives them, and is deterministic.

    Args:
        tokens_BNC: Raster order; computed in float32 at least.
        boxes_BK4: Normalised `x0, y0, x1, y1`, float32 or float64, on any device.
        grid: Rows and columns `(h, w)` of the token grid.
        output_size: Rows and columns `(p, q)` of the result.

    Returns:
        `rois [B * K, p * q, C]`, the boxes of the first image first.

    Source: UniRefiner, arXiv:2605.19622, student crop features; operation of Mask R-CNN,
    arXiv:1703.06870.
    """
    (height, width), (rows, columns) = grid, output_size
    batch, num_tokens, channels = tokens_BNC.shape
    if num_tokens != height * width:
        raise ValueError(f"{num_tokens} tokens do not fill a grid of {height}x{width}")
    if boxes_BK4.shape[0] != batch or boxes_BK4.shape[-1] != 4:
        raise ValueError(f"boxes are {tuple(boxes_BK4.shape)}, wanted [{batch}, boxes, 4]")
    tokens_BNC = widen(tokens_BNC)
    x0_BK, y0_BK, x1_BK, y1_BK = widen(boxes_BK4).detach().unbind(-1)
    device, dtype = tokens_BNC.device, tokens_BNC.dtype
    weights_y_BKph = axis_weights(y0_BK, y1_BK, num_cells=height, num_bins=rows, device=device)
    weights_x_BKqw = axis_weights(x0_BK, x1_BK, num_cells=width, num_bins=columns, device=device)

    num_boxes = boxes_BK4.shape[1]
    lines = weights_y_BKph.to(dtype).flatten(1, 2) @ tokens_BNC.reshape(
        batch, height, width * channels
    )
    lines_BKpwC = lines.view(batch, num_boxes, rows, width, channels)
    rois_BKpqC = weights_x_BKqw.to(dtype)[:, :, None] @ lines_BKpwC
    return rois_BKpqC.reshape(batch * num_boxes, rows * columns, channels)
