"""Pictures of features: their first three principal components as colours.

    draw_preview(images, raw, refined, grid)      # preview.png, both in one basis
    basis = ColorBasis.fit(tokens)                # a basis that stays while features change
    draw_sheet(images, {"before": basis.colors(raw), "step 100": basis.colors(now)}, grid)

Dimension key: B = images, N = tokens, C = channels, S = side in pixels, X = any number of tokens.
"""

import io
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

_CELL = 256
_HEADER = 22


class ColorBasis(NamedTuple):
    """How tokens become colours; fitted to some and applied to others too."""

    mean_C: Tensor
    basis_C3: Tensor
    low_3: Tensor
    high_3: Tensor

    @classmethod
    def fit(cls, tokens_XC: Tensor) -> Self:
        """The first three principal components of tokens, and their ranges without outliers."""
        unit_XC = F.normalize(tokens_XC.float(), dim=-1)
        mean_C = unit_XC.mean(dim=0)
        centred_XC = unit_XC - mean_C
        basis_C3 = _first_components(centred_XC)
        # An eigenvector's sign is arbitrary: fixed, so that equal features get equal colours.
        largest_3 = basis_C3.take_along_dim(basis_C3.abs().argmax(dim=0, keepdim=True), dim=0)
        basis_C3 = basis_C3 * largest_3.sign()
        ascending_X3 = (centred_XC @ basis_C3).sort(dim=0).values
        last = len(ascending_X3) - 1
        low_3, high_3 = ascending_X3[round(0.01 * last)], ascending_X3[round(0.99 * last)]
        return cls(mean_C, basis_C3, low_3, high_3)

    def colors(self, tokens_XC: Tensor) -> Tensor:
        """Colours in [0, 1], [X, 3]; what lies outside of the fitted range is clamped to it."""
        centred_XC = F.normalize(tokens_XC.float(), dim=-1) - self.mean_C
        width_3 = (self.high_3 - self.low_3).clamp(min=1e-12)
        colors_X3: Tensor = (centred_XC @ self.basis_C3 - self.low_3) / width_3
        return colors_X3.clamp(0, 1)


def _first_components(centred_XC: Tensor) -> Tensor:
    num_tokens, num_channels = centred_XC.shape
    if 3 <= num_tokens < num_channels:  # the smaller of both products has the same components
        _, vectors_XX = torch.linalg.eigh(centred_XC @ centred_XC.T)
        return F.normalize(centred_XC.T @ vectors_XX[:, -3:].flip(-1), dim=0)
    _, vectors_CC = torch.linalg.eigh(centred_XC.T @ centred_XC)
    basis_C3: Tensor = vectors_CC[:, -3:].flip(-1)
    return basis_C3


def principal_colors(tokens_XC: Tensor) -> Tensor:
    """Tokens as colours in [0, 1], [X, 3]: their first three principal components."""
    return ColorBasis.fit(tokens_XC).colors(tokens_XC)


def draw_sheet(
    images_B3SS: Tensor, columns: Mapping[str, Tensor], grid: tuple[int, int]
) -> Image.Image:
    """A row per image: the image, then a cell per column.

    Args:
        images_B3SS: uint8.
        columns: Title to colours in [0, 1] of every image's tokens, [B, N, 3].
        grid: (h, w) in patches.
    """
    maps = {
        title: (colors_BN3.cpu().view(-1, *grid, 3) * 255).round().to(torch.uint8)
        for title, colors_BN3 in columns.items()
    }
    size = ((1 + len(maps)) * _CELL, _HEADER + len(images_B3SS) * _CELL)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(["image", *maps]):
        pen.text((column * _CELL + 8, 5), title, fill="black")
    for row, image_3SS in enumerate(images_B3SS):
        cells = [image_3SS.permute(1, 2, 0), *(maps_Bhw3[row] for maps_Bhw3 in maps.values())]
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell.cpu().contiguous().numpy())
            resample = Image.Resampling.LANCZOS if column == 0 else Image.Resampling.NEAREST
            place = (column * _CELL, _HEADER + row * _CELL)
            sheet.paste(picture.resize((_CELL, _CELL), resample), place)
    return sheet


def draw_preview(
    images_B3SS: Tensor, raw_BNC: Tensor, refined_BNC: Tensor, grid: tuple[int, int]
) -> bytes:
    """A PNG with a row per image: the image, its raw features, its refined features.

    Args:
        images_B3SS: uint8.
        raw_BNC, refined_BNC: Dense features; their colours mean the same in both columns.
        grid: (h, w) in patches.
    """
    both_2BNC = torch.stack([raw_BNC, refined_BNC]).float().cpu()
    colors_X3 = principal_colors(both_2BNC.flatten(0, 2))
    before_BN3, after_BN3 = colors_X3.view(2, len(images_B3SS), -1, 3)
    return png(draw_sheet(images_B3SS, {"before": before_BN3, "after": after_BN3}, grid))


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
