"""ROI-align in plain PyTorch: two matrix products, and their transpose.

Dimension key: that of `kernels.roi_align`, and G = samples of an output bin along one axis,
S = cells of the sampled axis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.precision import full_precision, widen
from kernels.window import TokenWindow

EPS = 1e-12  # as in torch.nn.functional.normalize


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
        `weights_BKPS`. Rows of a box that is empty, turned inside out or not finite are zero.
    """
    starts_BK, ends_BK = starts_BK * num_cells - 0.5, ends_BK * num_cells - 0.5
    bin_size_BK = (ends_BK - starts_BK) / num_bins
    num_samples_BK = bin_size_BK.ceil().clamp(min=0).nan_to_num(nan=0, posinf=0)
    # Steps are longer than half a cell where there are several, so that no more than this many
    # samples of a bin lie between the rims, however large the box.
    num_tried_BK = num_samples_BK.clamp(max=2 * num_cells + 6)
    largest = int(num_tried_BK.max()) if num_tried_BK.numel() else 0
    starts_BK, bin_size_BK, num_samples_BK = (
        tensor.to(device) for tensor in (starts_BK, bin_size_BK, num_samples_BK)
    )

    bins_P1 = torch.arange(num_bins, device=starts_BK.device, dtype=starts_BK.dtype)[:, None]
    tried_G = torch.arange(largest, device=starts_BK.device, dtype=starts_BK.dtype)
    step_BK11 = (bin_size_BK / num_samples_BK.clamp(min=1))[..., None, None]
    bin_start_BKP1 = starts_BK[..., None, None] + bins_P1 * bin_size_BK[..., None, None]
    samples_BKPG = ((-1 - bin_start_BKP1) / step_BK11).floor().sub(1).clamp(min=0) + tried_G
    positions_BKPG = bin_start_BKP1 + (samples_BKPG + 0.5) * step_BK11
    # One cell beyond the rim still counts, as the rim itself; further out a sample is zero, but it
    # stays in the average.
    is_counted_BKPG = (
        (positions_BKPG >= -1)
        & (positions_BKPG <= num_cells)
        & (samples_BKPG < num_samples_BK[..., None, None])
    )
    positions_BKPG = positions_BKPG.clamp(0, num_cells - 1)

    cells_S = torch.arange(num_cells, device=starts_BK.device, dtype=starts_BK.dtype)
    hats_BKPGS = (1 - (positions_BKPG[..., None] - cells_S).abs()).clamp(min=0)
    hats_BKPGS = hats_BKPGS.masked_fill(~is_counted_BKPG[..., None], 0)
    return hats_BKPGS.sum(dim=-2) / num_samples_BK.clamp(min=1)[..., None, None]


@full_precision
def forward_reference(
    tokens_BNC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
) -> Tensor:
    """The two products, `[R, P, C]`; differentiable in the tokens."""
    tokens_BNC = widen(tokens_BNC)
    weights_y_Rph, weights_x_Rqw = _dense_weights(boxes_R4, window, output_size, tokens_BNC)
    width, (rows, columns) = window.grid[1], output_size
    channels = tokens_BNC.shape[2]
    if not num_boxes:
        return tokens_BNC.new_zeros(0, rows * columns, channels)

    rois_kPC = []
    # Image by image: the lines between the two products are larger than tokens and result.
    for map_hx, weights_kph, weights_kqw in zip(
        _image_of(tokens_BNC, window).flatten(2),
        weights_y_Rph.split(list(num_boxes)),
        weights_x_Rqw.split(list(num_boxes)),
        strict=True,
    ):
        lines_kpx = weights_kph.flatten(0, 1) @ map_hx
        lines_kpwC = lines_kpx.view(len(weights_kph), rows, width, channels)
        rois_kPC.append((weights_kqw[:, None] @ lines_kpwC).flatten(1, 2))
    return torch.cat(rois_kPC)


@full_precision
def backward_reference(
    gradient_RPC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
) -> Tensor:
    """The transpose of the two products."""
    gradient_RPC = widen(gradient_RPC)
    weights_y_Rph, weights_x_Rqw = _dense_weights(boxes_R4, window, output_size, gradient_RPC)
    lines_Rpx = (weights_x_Rqw.mT[:, None] @ gradient_RPC.unflatten(1, output_size)).flatten(2)

    shape = (len(num_boxes), window.num_tokens, gradient_RPC.shape[2])
    token_gradient_BNC = gradient_RPC.new_zeros(shape)
    for map_hwC, weights_kph, lines_kpx in zip(
        _image_of(token_gradient_BNC, window),
        weights_y_Rph.split(list(num_boxes)),
        lines_Rpx.split(list(num_boxes)),
        strict=True,
    ):
        gradient_hx = weights_kph.flatten(0, 1).T @ lines_kpx.flatten(0, 1)
        map_hwC.copy_(gradient_hx.view(map_hwC.shape))
    return token_gradient_BNC


def normalize_backward_reference(
    gradient_RPC: Tensor, units_RPC: Tensor, norms_RP: Tensor
) -> Tensor:
    """Gradient of the vectors that were scaled to unit length."""
    radial_RP = (gradient_RPC * units_RPC).sum(dim=-1).masked_fill(norms_RP < EPS, 0)
    tangent_RPC = gradient_RPC - radial_RP[..., None] * units_RPC
    return tangent_RPC / norms_RP.clamp(min=EPS)[..., None]


def _dense_weights(
    boxes_R4: Tensor, window: TokenWindow, output_size: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of rows and of columns, `[R, p, h]` and `[R, q, w]`, where and as `like` is."""
    x0_R, y0_R, x1_R, y1_R = boxes_R4.unbind(-1)
    weights = (
        axis_weights(start, end, num_cells=cells, num_bins=bins, device=like.device).to(like.dtype)
        for start, end, cells, bins in zip(
            (y0_R, x0_R), (y1_R, x1_R), window.grid, output_size, strict=True
        )
    )
    return next(weights), next(weights)


def _image_of(tokens_BNC: Tensor, window: TokenWindow) -> Tensor:
    """View of the image's tokens without prefix and border: `[B, h, w, C]`."""
    (height, width), border = window.grid, window.border
    canvas = (height + 2 * border, width + 2 * border)
    canvas_BHWC: Tensor = tokens_BNC[:, window.prefix :].unflatten(1, canvas)
    return canvas_BHWC[:, border : border + height, border : border + width]
