"""Pictures of the page as data URIs: photographs, colours of tokens, maps, tokens marked.

Maps have one pixel per token: the page enlarges them without smoothing.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from trainer.pages import data_uri
from trainer.preview import ColorBasis
from trainer.report.measure import Shown, View

SCALE = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
"""Viridis at nine places: even in lightness, and readable with every kind of colour vision.

Source: matplotlib's viridis (Smith, van der Walt, Firing; CC0)."""
_CELL = 8
_GAP = 4


def photograph(image_3HW: Tensor) -> str:
    """A JPEG of the image as the backbones get it."""
    return data_uri(_picture(image_3HW), "JPEG", quality=80)


def scalar_map(values_N: Tensor, grid: tuple[int, int], low: float, high: float) -> str:
    """Values of tokens by `SCALE`, from `low` to `high`; what is outside takes an end's colour."""
    share_N = ((values_N.float() - low) / max(high - low, 1e-12)).clamp(0, 1)
    place_N = share_N * (len(SCALE) - 1)
    below_N = place_N.floor().clamp(max=len(SCALE) - 2).long()
    table = torch.tensor(SCALE, dtype=torch.float32)
    part_N1 = (place_N - below_N)[:, None]
    colors_N3 = table[below_N] * (1 - part_N1) + table[below_N + 1] * part_N1
    return data_uri(_map(colors_N3, grid), "PNG")


def marked(image_3HW: Tensor, is_marked_N: Tensor, grid: tuple[int, int], color: str) -> str:
    """The image in pale grey, marked tokens in a colour (`#rrggbb`) over it."""
    size = (grid[1] * _CELL, grid[0] * _CELL)
    grey = _picture(image_3HW).convert("L").resize(size, Image.Resampling.LANCZOS)
    grey = grey.point([round(96 + 0.6 * value) for value in range(256)])
    picture = grey.convert("RGB")
    opacity = Image.fromarray((is_marked_N.view(grid).to(torch.uint8) * 205).numpy())
    mask = opacity.resize(size, Image.Resampling.NEAREST)
    picture.paste(Image.new("RGB", size, color), mask=mask)
    return data_uri(picture, "JPEG", quality=76)


def principal_maps(one: Shown) -> dict[str, str]:
    """Tokens of every view as colours of one basis, the refined one's registers around them.

    All pictures of an image have one size: without a border, what would be its place is left clear.
    """
    every_XC = torch.cat([view.unit_NC for view in one.views.values()])
    basis = ColorBasis.fit(every_XC)
    widest = max(view.width for view in one.views.values())
    return {
        title: data_uri(_framed(view, one.grid, basis, widest), "PNG")
        for title, view in one.views.items()
    }


def _framed(view: View, grid: tuple[int, int], basis: ColorBasis, widest: int) -> Image.Image:
    inner = _enlarged(basis.colors(view.unit_NC) * 255, grid)
    if not widest:
        return inner
    rows, columns = grid
    margin = widest * _CELL + _GAP
    size = (inner.width + 2 * margin, inner.height + 2 * margin)
    frame = Image.new("RGBA", size)
    if view.registers_RC is not None:
        _paste_registers(frame, basis.colors(view.registers_RC) * 255, grid, view.width)
    frame.paste(inner, (margin, margin, margin + inner.width, margin + inner.height))
    return frame


def _paste_registers(
    frame: Image.Image, colors_R3: Tensor, grid: tuple[int, int], width: int
) -> None:
    """The border's tokens, raster order over the canvas, with a gap between them and the image."""
    rows, columns = grid[0] + 2 * width, grid[1] + 2 * width
    colors = iter(colors_R3.round().to(torch.uint8).tolist())
    for row in range(rows):
        for column in range(columns):
            if width <= row < rows - width and width <= column < columns - width:
                continue
            x = _place(column, width, grid[1])
            y = _place(row, width, grid[0])
            frame.paste((*next(colors), 255), (x, y, x + _CELL, y + _CELL))


def _place(index: int, width: int, side: int) -> int:
    gaps = (index >= width) + (index >= width + side)
    return index * _CELL + gaps * _GAP


def _map(colors_N3: Tensor, grid: tuple[int, int]) -> Image.Image:
    pixels = colors_N3.view(*grid, 3).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.contiguous().numpy())


def _enlarged(colors_N3: Tensor, grid: tuple[int, int]) -> Image.Image:
    size = (grid[1] * _CELL, grid[0] * _CELL)
    return _map(colors_N3, grid).resize(size, Image.Resampling.NEAREST)


def _picture(image_3HW: Tensor) -> Image.Image:
    return Image.fromarray(image_3HW.permute(1, 2, 0).contiguous().numpy())


def scale_gradient(colors: Sequence[tuple[int, int, int]] = SCALE) -> str:
    """`SCALE` as a CSS gradient from left to right."""
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colors)
    return f"linear-gradient(to right, {stops})"
