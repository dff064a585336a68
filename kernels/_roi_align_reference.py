"""ROI-align in plain PyTorch: two matrix products for each box, and their transpose.

Dimension key: that of `kernels.roi_align`, and G = samples of an output bin along one axis,
S = cells of the sampled axis, k = some boxes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.precision import SHORTEST_NORM, full_precision, wide_dtype, widen
from kernels.window import TokenWindow

_WEIGHTS_AT_ONCE = 1 << 20  # of one axis, so that many boxes on a long axis cost no more memory


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

    device, dtype = starts_BK.device, starts_BK.dtype
    bins_P = torch.arange(num_bins, device=device, dtype=dtype)
    cells_S = torch.arange(num_cells, device=device, dtype=dtype)
    step_BK1 = (bin_size_BK / num_samples_BK.clamp(min=1))[..., None]
    bin_start_BKP = starts_BK[..., None] + bins_P * bin_size_BK[..., None]
    first_BKP = ((-1 - bin_start_BKP) / step_BK1).floor().sub(1).clamp(min=0)
    weights_BKPS = bin_start_BKP.new_zeros(*bin_start_BKP.shape, num_cells)
    # Sample by sample: all at once would hold G times as many numbers.
    for tried in range(largest):
        sample_BKP = first_BKP + tried
        position_BKP = bin_start_BKP + (sample_BKP + 0.5) * step_BK1
        # One cell beyond the rim still counts, as the rim itself; further out a sample is zero, but
        # it stays in the average.
        is_counted_BKP = (
            (position_BKP >= -1)
            & (position_BKP <= num_cells)
            & (sample_BKP < num_samples_BK[..., None])
        )
        position_BKP = position_BKP.clamp(0, num_cells - 1)
        hats_BKPS = (1 - (position_BKP[..., None] - cells_S).abs()).clamp(min=0)
        weights_BKPS += hats_BKPS.masked_fill(~is_counted_BKP[..., None], 0)
    return weights_BKPS / num_samples_BK.clamp(min=1)[..., None, None]


@full_precision
def forward_reference(
    tokens_BNC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
) -> Tensor:
    """The two products of every box, `[R, P, C]`; differentiable in the tokens."""
    rows, columns = output_size
    channels = tokens_BNC.shape[2]
    dtype = wide_dtype(tokens_BNC)
    rois_RPC = tokens_BNC.new_empty((len(boxes_R4), rows * columns, channels), dtype=dtype)
    maps_BhwC = _image_of(tokens_BNC, window)
    for index, box in enumerate(_touched(boxes_R4, num_boxes, window, output_size, rois_RPC)):
        part_hwC = widen(maps_BhwC[box.image, box.y, box.x])
        lines_px = box.weights_ph @ part_hwC.flatten(1)
        lines_pwC = lines_px.view(rows, part_hwC.shape[1], channels)
        rois_RPC[index] = (box.weights_qw @ lines_pwC).flatten(0, 1)
    return rois_RPC


@full_precision
def backward_reference(
    gradient_RPC: Tensor,
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
) -> Tensor:
    """The transpose of the two products."""
    shape = (len(num_boxes), window.num_tokens, gradient_RPC.shape[2])
    dtype = wide_dtype(gradient_RPC)
    token_gradient_BNC = gradient_RPC.new_zeros(shape, dtype=dtype)
    maps_BhwC = _image_of(token_gradient_BNC, window)
    boxes = _touched(boxes_R4, num_boxes, window, output_size, token_gradient_BNC)
    for box, gradient_PC in zip(boxes, gradient_RPC, strict=True):
        lines_pwC = box.weights_qw.T @ widen(gradient_PC).unflatten(0, output_size)
        part_hwC = maps_BhwC[box.image, box.y, box.x]
        part_hwC += (box.weights_ph.T @ lines_pwC.flatten(1)).view(part_hwC.shape)
    return token_gradient_BNC


def normalize_backward_reference(
    gradient_RPC: Tensor, units_RPC: Tensor, norms_RP: Tensor
) -> Tensor:
    """Gradient of the vectors that were scaled to unit length."""
    radial_RP = (gradient_RPC * units_RPC).sum(dim=-1).masked_fill(norms_RP < SHORTEST_NORM, 0)
    tangent_RPC = gradient_RPC - radial_RP[..., None] * units_RPC
    return tangent_RPC / norms_RP.clamp(min=SHORTEST_NORM)[..., None]


class _Box(NamedTuple):
    """A box: its image, the cells that it touches, and their weights."""

    image: int
    y: slice
    x: slice
    weights_ph: Tensor
    weights_qw: Tensor


def _touched(
    boxes_R4: Tensor,
    num_boxes: Sequence[int],
    window: TokenWindow,
    output_size: tuple[int, int],
    like: Tensor,
) -> Iterator[_Box]:
    """Every box, with weights where and as `like` is."""
    images = (image for image, number in enumerate(num_boxes) for _ in range(number))
    sides = zip(window.grid, output_size, strict=True)
    largest = max(cells * bins for cells, bins in sides)
    for boxes_k4 in boxes_R4.split(max(1, _WEIGHTS_AT_ONCE // largest)):
        x0_k, y0_k, x1_k, y1_k = boxes_k4.unbind(-1)
        weights_kph, weights_kqw = (
            axis_weights(start, end, num_cells=cells, num_bins=bins, device=like.device).to(
                like.dtype
            )
            for start, end, cells, bins in zip(
                (y0_k, x0_k), (y1_k, x1_k), window.grid, output_size, strict=True
            )
        )
        for y, x, weights_ph, weights_qw in zip(
            _spans(weights_kph), _spans(weights_kqw), weights_kph, weights_kqw, strict=True
        ):
            yield _Box(next(images), y, x, weights_ph[:, y], weights_qw[:, x])


def _spans(weights_RPS: Tensor) -> list[slice]:
    """From the first to the last cell that counts in any bin of a box; none of an empty box."""
    is_touched_RS = (weights_RPS != 0).any(dim=1).int()
    first_R = is_touched_RS.argmax(dim=1)
    end_R = is_touched_RS.shape[1] - is_touched_RS.flip(1).argmax(dim=1)
    end_R = end_R.where(is_touched_RS.any(dim=1), first_R)
    return [slice(*ends) for ends in zip(first_R.tolist(), end_R.tolist(), strict=True)]


def _image_of(tokens_BNC: Tensor, window: TokenWindow) -> Tensor:
    """View of the image's tokens without prefix and border: `[B, h, w, C]`."""
    (height, width), border = window.grid, window.border
    canvas = (height + 2 * border, width + 2 * border)
    canvas_BHWC: Tensor = tokens_BNC[:, window.prefix :].unflatten(1, canvas)
    return canvas_BHWC[:, border : border + height, border : border + width]
