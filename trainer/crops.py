"""Crops of an image, on its pixels and on its token grid, and crops joined with foreign content.

Boxes are normalised `x0, y0, x1, y1`, float32, and stay on the CPU.

Dimension key: B = images, K = boxes of an image, Q = B * K crops (those of the first image first),
N = h * w tokens in raster order, C = channels.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels import axis_weights, full_precision, roi_align, widen

Side = Literal["left", "above", "right", "below"]


class Composite(NamedTuple):
    """`pixels [Q, 3, H', W']`, and `is_crop [h' * w']`: which of its tokens show the crop."""

    pixels: Tensor
    is_crop: Tensor


def sample_boxes(
    batch: int,
    num_crops: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw `boxes_BK4`: uniform area, log-uniform aspect ratio, centre uniform over the image.

    A box that would stick out is moved inside; one longer than the image is cut to it.

    Args:
        batch, num_crops: B and K.
        area: Smallest and largest share of the image.
        aspect: Smallest and largest width over height.
        generator: Of the CPU.

    Source: UniRefiner, arXiv:2605.19622, proposals.
    """
    area_u, aspect_u, x_u, y_u = torch.rand(4, batch, num_crops, generator=generator)
    area_BK = area[0] + (area[1] - area[0]) * area_u
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    aspect_BK = (log_low + (log_high - log_low) * aspect_u).exp()
    width_BK = (area_BK * aspect_BK).sqrt().clamp(max=1)
    height_BK = (area_BK / aspect_BK).sqrt().clamp(max=1)
    x0_BK = (x_u - width_BK / 2).clamp(min=0).minimum(1 - width_BK)
    y0_BK = (y_u - height_BK / 2).clamp(min=0).minimum(1 - height_BK)
    return torch.stack([x0_BK, y0_BK, x0_BK + width_BK, y0_BK + height_BK], dim=-1).clamp(0, 1)


@full_precision
def crop_views(
    pixels_B3HW: Tensor, boxes_BK4: Tensor, *, output_size: tuple[int, int] | None = None
) -> Tensor:
    """The boxes resampled by ROI-align on the pixels: `views [Q, 3, H, W]`, float32 at least.

    As large as the image unless `output_size` (height, width) says otherwise. The same operator as
    `crop_tokens`, so that a view and the student's crop tokens show exactly the same place, and
    deterministic on every device.

    Source: UniRefiner, arXiv:2605.19622, crop views.
    """
    batch, num_channels, height, width = pixels_B3HW.shape
    rows, columns = output_size or (height, width)
    pixels_B13HW = widen(pixels_B3HW)[:, None]
    x0_BK, y0_BK, x1_BK, y1_BK = boxes_BK4.unbind(-1)
    device = pixels_B3HW.device
    weights_y_BKpH = axis_weights(y0_BK, y1_BK, num_cells=height, num_bins=rows, device=device)
    weights_x_BKqW = axis_weights(x0_BK, x1_BK, num_cells=width, num_bins=columns, device=device)
    views_BK3pq = weights_y_BKpH[:, :, None] @ pixels_B13HW @ weights_x_BKqW[:, :, None].mT
    return views_BK3pq.reshape(-1, num_channels, rows, columns)


def crop_tokens(tokens_BNC: Tensor, boxes_BK4: Tensor, grid: tuple[int, int]) -> Tensor:
    """The boxes resampled by ROI-align on the token grid `(h, w)`: `[Q, N, C]`, not normalised.

    The result has the grid of the input, as the crop's own view has. Differentiable in the tokens.

    Source: UniRefiner, arXiv:2605.19622, Z_s^roi.
    """
    return roi_align(tokens_BNC, boxes_BK4, grid=grid, output_size=grid)


def strip_width(grid_side: int, share: float) -> int:
    """Tokens of a reference strip: `floor(share * side)`, one more where that is odd, two at least.

    Differs: the minimum, which a grid of two or fewer tokens would fall short of.
    """
    tokens = math.floor(share * grid_side)
    return max(2, tokens + tokens % 2)


def compose(
    crops_Q3HW: Tensor, reference_13HW: Tensor, *, side: Side, share: float, patch_size: int
) -> Composite:
    """Join every crop with a strip of the reference image on one side.

    The strip is the reference's own outermost part on that side, along the whole edge. The canvas
    is wider (or higher) than the crop by `strip_width` tokens.

    Args:
        crops_Q3HW: Crop views.
        reference_13HW: The reference image at the same size.
        side: Where the strip goes.
        share: Strip width over the crop's.
        patch_size: Pixels.

    Source: UniRefiner, arXiv:2605.19622, intra-image comparison.
    """
    height, width = crops_Q3HW.shape[-2:]
    if reference_13HW.shape[-2:] != (height, width):
        got = "x".join(map(str, reference_13HW.shape[-2:]))
        raise ValueError(f"the reference image is {got} px, the crops {height}x{width} px")
    axis = -1 if side in ("left", "right") else -2
    comes_first = side in ("left", "above")
    strip_tokens = strip_width(crops_Q3HW.shape[axis] // patch_size, share)
    strip_pixels = strip_tokens * patch_size
    start = 0 if comes_first else reference_13HW.shape[axis] - strip_pixels
    strip = reference_13HW.narrow(axis, start, strip_pixels)
    strip_Q3HS = strip.expand(len(crops_Q3HW), -1, -1, -1).to(crops_Q3HW)
    crop_mask_hw = torch.ones(height // patch_size, width // patch_size, dtype=torch.bool)
    strip_mask = torch.zeros_like(crop_mask_hw).narrow(axis, 0, strip_tokens)

    pixels, mask = [strip_Q3HS, crops_Q3HW], [strip_mask, crop_mask_hw]
    if not comes_first:
        pixels, mask = pixels[::-1], mask[::-1]
    is_crop = torch.cat(mask, dim=axis).flatten()
    return Composite(torch.cat(pixels, dim=axis), is_crop.to(crops_Q3HW.device))
