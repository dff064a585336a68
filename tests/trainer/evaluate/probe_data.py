"""Grids and labels that probes are tried on: 8 px tokens, 4x6 of them."""

import torch
from torch import Tensor

TOKEN = 8
NUM_CLASSES = 4


def blocky(cells: Tensor) -> Tensor:
    """A value per token to a value per pixel, `[h, w]` to `[8h, 8w]`."""
    return cells.repeat_interleave(TOKEN, dim=-2).repeat_interleave(TOKEN, dim=-1)


def striped_labels(count: int, *, seed: int) -> list[Tensor]:
    """Label maps of 4x6 tokens, one class per column: few corners that bilinear logits round."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(NUM_CLASSES, (count, 1, 6), generator=generator)
    return list(blocky(columns.expand(-1, 4, -1)).to(torch.uint8))


def telling_grids(labels: list[Tensor], *, seed: int) -> list[Tensor]:
    """Grids that hold the tokens' own classes in four of twelve noisy channels."""
    generator = torch.Generator().manual_seed(seed)
    grids = []
    for label in labels:
        one_hot = torch.nn.functional.one_hot(label[::TOKEN, ::TOKEN].long(), NUM_CLASSES).float()
        noise = torch.randn(*one_hot.shape[:2], 8, generator=generator)
        grids.append(torch.cat([one_hot, noise], dim=-1))
    return grids


def noise_grids(count: int, *, seed: int, size: tuple[int, int] = (4, 6)) -> list[Tensor]:
    return list(torch.randn(count, *size, 12, generator=torch.Generator().manual_seed(seed)))
