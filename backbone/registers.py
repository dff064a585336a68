"""The register border: tokens around the image that carry no image content.

    width = border_width((32, 32), r_reg=32)                     # patches on each side
    canvas = surround(pixels, border, width=width, patch_size=16)
    image, registers = strip(tokens, grid=(32, 32), width=width)

The canvas of an image of h x w patches is (h + 2n) x (w + 2n) patches with the image in the middle.
Token order is raster order over the canvas.

Dimension key: B = images, H, W = image height and width in pixels, Hc, Wc = the canvas's,
N = image tokens, R = register tokens, C = channels.

Source: UniRefiner, arXiv:2605.19622, register border.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Rounding = Literal["ceil", "floor"]
NoiseFill = Literal["gaussian", "zeros", "uniform"]
Fill = Literal["gaussian", "zeros", "uniform", "learnable"]


class Stripped(NamedTuple):
    """Tokens of a canvas, told apart."""

    image: Tensor  # [B, N, C], raster order over the image's grid
    registers: Tensor  # [B, R, C], raster order over the canvas


def border_width(grid: tuple[int, int], r_reg: int, rounding: Rounding = "ceil") -> int:
    """Register tokens on each side: `max(1, ceil(min(h, w) / r_reg))`.

    Args:
        grid: The image's (h, w) in patches.
        r_reg: Image tokens per register token of width; 32 in most recipes, 37 for DINOv2.
        rounding: `ceil` as the paper has it; `floor` as the authors' release does.
    """
    round_ = math.ceil if rounding == "ceil" else math.floor
    return max(1, round_(min(grid) / r_reg))


def canvas_size(image: tuple[int, int], width: int, patch_size: int) -> tuple[int, int]:
    """Canvas (Hc, Wc) in pixels of an image (H, W) in pixels with a border of `width` patches."""
    extra = 2 * width * patch_size
    return image[0] + extra, image[1] + extra


def draw_border(
    fill: NoiseFill,
    canvas: tuple[int, int],
    *,
    generator: torch.Generator,
    batch: int | None = None,
) -> Tensor:
    """Border pixels in normalised image space, drawn for a whole canvas on the CPU.

    Args:
        fill: `gaussian` N(0, 1), `uniform` U(0, 1), or `zeros`.
        canvas: (Hc, Wc) in pixels.
        generator: A CPU generator; not used by `zeros`.
        batch: Draw one border per image instead of one for all.

    Returns:
        float32 [3, Hc, Wc], or [B, 3, Hc, Wc] with `batch`.
    """
    shape = (3, *canvas) if batch is None else (batch, 3, *canvas)
    if fill == "zeros":
        return torch.zeros(shape)
    if fill == "gaussian":
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator)


def seeded_border(fill: NoiseFill, canvas: tuple[int, int], seed: int) -> Tensor:
    """The border used at inference: the same for the same canvas, fill and seed, [3, Hc, Wc]."""
    return draw_border(fill, canvas, generator=torch.Generator().manual_seed(seed))


def surround(pixels_B3HW: Tensor, border: Tensor, *, width: int, patch_size: int) -> Tensor:
    """Lay images in the middle of a border.

    Args:
        pixels_B3HW: Normalised images.
        border: [3, Hc, Wc] or [B, 3, Hc, Wc]; its middle is not used. Gradients flow into its rim.
        width: Border width in patches.
        patch_size: Side of a patch in pixels.

    Returns:
        [B, 3, Hc, Wc], in the dtype of the images.
    """
    batch, channels, height, image_width = pixels_B3HW.shape
    canvas = canvas_size((height, image_width), width, patch_size)
    if tuple(border.shape[-2:]) != canvas:
        raise ValueError(
            f"border is {tuple(border.shape[-2:])} px, but the canvas of a "
            f"{height}x{image_width} px image with {width} patches of {patch_size} px on each side "
            f"is {canvas}"
        )
    out = border.to(pixels_B3HW).expand(batch, channels, *canvas).clone()
    margin = width * patch_size
    out[:, :, margin : margin + height, margin : margin + image_width] = pixels_B3HW
    return out


def register_mask(
    grid: tuple[int, int], width: int, device: torch.device | str | None = None
) -> Tensor:
    """`is_register`, bool [tokens of the canvas], raster order, of an image of `grid` patches."""
    h, w = grid
    mask = torch.ones(h + 2 * width, w + 2 * width, dtype=torch.bool, device=device)
    mask[width : width + h, width : width + w] = False
    return mask.flatten()


def strip(tokens: Tensor, grid: tuple[int, int], width: int) -> Stripped:
    """Undo `surround` on tokens: [B, Nc, C] to the image's and the register border's.

    Raises:
        ValueError: the token count is not that of the canvas.
    """
    h, w = grid
    canvas_h, canvas_w = h + 2 * width, w + 2 * width
    if tokens.shape[1] != canvas_h * canvas_w:
        raise ValueError(
            f"{tokens.shape[1]} tokens are not a canvas of {canvas_h}x{canvas_w}, "
            f"the {h}x{w} image grid with {width} register tokens on each side"
        )
    canvas = tokens.view(tokens.shape[0], canvas_h, canvas_w, -1)
    image = canvas[:, width : width + h, width : width + w].flatten(1, 2)
    return Stripped(image, tokens[:, register_mask(grid, width, tokens.device)])


class LearnableBorder(nn.Module):
    """Trained border patches in place of noise (the paper's ablation "learnable tokens").

    One patch of pixels for each register token of the training canvas. The patch embedding is
    linear and 3 p^2 pixels are at least as many numbers as its output in the usual backbones, so
    training pixels trains the border's embeddings. On a canvas of another shape every border
    patch takes the trained patch at the same relative place.

    Attributes:
        patches: [3, Hc / p, Wc / p, p, p]; those in the middle are never used.
    """

    def __init__(self, canvas: tuple[int, int], width: int, patch_size: int) -> None:
        super().__init__()
        rows, columns = canvas[0] // patch_size, canvas[1] // patch_size
        self.patch_size = patch_size
        self.trained_width = width
        self.patches = nn.Parameter(torch.zeros(3, rows, columns, patch_size, patch_size))

    def forward(self, canvas: tuple[int, int], width: int) -> Tensor:
        """The border of a canvas (Hc, Wc) in pixels, `width` patches wide: [3, Hc, Wc]."""
        rows, columns = canvas[0] // self.patch_size, canvas[1] // self.patch_size
        row = self._trained_places(rows, self.patches.shape[1], width)
        column = self._trained_places(columns, self.patches.shape[2], width)
        chosen = self.patches[:, row][:, :, column]
        return chosen.permute(0, 1, 3, 2, 4).reshape(3, *canvas)

    def _trained_places(self, count: int, trained: int, width: int) -> Tensor:
        """For each of `count` canvas rows the trained row to take: rim to rim, inside to inside."""
        place = torch.arange(count)
        outer = torch.minimum(place, count - 1 - place)  # distance from the nearer edge
        rim = torch.clamp(outer, max=self.trained_width - 1)
        rim = torch.where(place < count / 2, rim, trained - 1 - rim)
        inner_count, inner_trained = count - 2 * width, trained - 2 * self.trained_width
        step = (place - width + 0.5) * inner_trained / max(inner_count, 1)
        inner = self.trained_width + torch.clamp(step.floor().long(), 0, inner_trained - 1)
        return torch.where(outer < width, rim, inner)
