"""preview.png: raw and refined features side by side, in the colours of one shared basis.

Dimension key: B = images, N = tokens, C = channels, S = side in pixels, X = any number of tokens.
"""

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

_CELL = 256
_HEADER = 22


def principal_colors(tokens_XC: Tensor) -> Tensor:
    """Tokens as colours in [0, 1], [X, 3]: their first three principal components."""
    unit_XC = F.normalize(tokens_XC.float(), dim=-1)
    centred_XC = unit_XC - unit_XC.mean(dim=0)
    _, vectors_CC = torch.linalg.eigh(centred_XC.T @ centred_XC)
    basis_C3 = vectors_CC[:, -3:].flip(-1)
    # An eigenvector's sign is arbitrary: fix it, so that the same features get the same colours.
    largest_3 = basis_C3.take_along_dim(basis_C3.abs().argmax(dim=0, keepdim=True), dim=0)
    components_X3 = centred_XC @ (basis_C3 * largest_3.sign())
    ascending_X3 = components_X3.sort(dim=0).values
    last = len(ascending_X3) - 1
    low_3, high_3 = ascending_X3[round(0.01 * last)], ascending_X3[round(0.99 * last)]
    colors_X3: Tensor = (components_X3 - low_3) / (high_3 - low_3).clamp(min=1e-12)
    return colors_X3.clamp(0, 1)


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
    colors_2Bhw3 = colors_X3.view(2, len(images_B3SS), *grid, 3)
    maps_2Bhw3 = (colors_2Bhw3 * 255).round().to(torch.uint8)
    sheet = Image.new("RGB", (3 * _CELL, _HEADER + len(images_B3SS) * _CELL), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "before", "after")):
        pen.text((column * _CELL + 8, 5), title, fill="black")
    for row, image_3SS in enumerate(images_B3SS):
        cells = (image_3SS.permute(1, 2, 0), maps_2Bhw3[0, row], maps_2Bhw3[1, row])
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell.cpu().contiguous().numpy())
            resample = Image.Resampling.LANCZOS if column == 0 else Image.Resampling.NEAREST
            place = (column * _CELL, _HEADER + row * _CELL)
            sheet.paste(picture.resize((_CELL, _CELL), resample), place)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
