"""Where an image's tokens lie in a sequence that also has prefix tokens and a register border."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenWindow(NamedTuple):
    """A token sequence: `prefix` tokens, then a canvas in raster order with the image inside.

    The canvas is `border` tokens wider than the image's grid (h, w) on each side. Cell (y, x) of
    the image is token `prefix + (y + border) * (w + 2 * border) + border + x`.
    """

    grid: tuple[int, int]
    border: int = 0
    prefix: int = 0

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""
        extra = 2 * self.border
        return self.prefix + (self.grid[0] + extra) * (self.grid[1] + extra)

    def image_index(self, device: torch.device | None = None) -> Tensor:
        """Positions of the image's tokens in raster order, int64 `[h * w]`."""
        (h, w), row = self.grid, self.grid[1] + 2 * self.border
        rows = torch.arange(h, device=device)[:, None] + self.border
        columns = torch.arange(w, device=device) + self.border
        return (self.prefix + rows * row + columns).flatten()

    def kept_index(self, device: torch.device | None = None) -> Tensor:
        """Positions of the prefix tokens, then of the image's: all but the border's."""
        return torch.cat([torch.arange(self.prefix, device=device), self.image_index(device)])

    def check(self, num_tokens: int) -> None:
        """Refuse a sequence of another length, and a window that nothing can lie in.

        Raises:
            ValueError: saying what does not fit.
        """
        if min(*self.grid, self.border, self.prefix) < 0:
            raise ValueError(f"{self} has a negative number")
        if num_tokens != self.num_tokens:
            h, w = self.grid
            raise ValueError(
                f"{num_tokens} tokens do not fill a grid of {h}x{w} with a border of {self.border} "
                f"and {self.prefix} prefix tokens: {self.num_tokens} are wanted"
            )
