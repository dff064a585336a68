"""Images to token grids, whole or by sliding windows.

Dimension key: B = images, H, W = pixels, N = tokens, C = channels, h, w = token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.evaluate.errors import EvaluationError

# uint8 [B, 3, H, W] to tokens [B, N, C] in raster order.
Encode = Callable[[Tensor], Tensor]


class Windows(NamedTuple):
    """Square windows that an image is encoded by, in pixels: whole patches both."""

    size: int
    stride: int

    def check(self, patch_size: int) -> None:
        """
        Raises:
            EvaluationError: size or stride is not whole patches, or windows would leave gaps.
        """
        for what, pixels in (("size", self.size), ("stride", self.stride)):
            if pixels < patch_size or pixels % patch_size:
                near = max(1, round(pixels / patch_size)) * patch_size
                raise EvaluationError(
                    f"window {what} {pixels} px is not a whole number of {patch_size} px patches; "
                    f"ask for {near}"
                )
        if self.stride > self.size:
            raise EvaluationError(
                f"window stride {self.stride} px is more than the window's {self.size} px, so "
                f"parts of the image would not be encoded; ask for {self.size} or less"
            )


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin along a side of `length`; the last is flush with the end.

    A side that is not longer than a window has one, at 0, which is as long as the side.
    """
    if length <= size:
        return [0]
    return [*range(0, length - size, stride), length - size]


def encode_grid(
    encode: Encode,
    images_B3HW: Tensor,
    *,
    patch_size: int,
    windows: Windows | None = None,
) -> Tensor:
    """Token grids of images of one shape.

    Args:
        encode: uint8 images of whole patches to their tokens `[B, N, C]`.
        images_B3HW: uint8, whole patches.
        patch_size: Of the tokens, in pixels.
        windows: Encode window by window, and average tokens where windows overlap: for a linear
            head that is the same as averaging its logits. None: the image at once.

    Returns:
        `[B, h, w, C]`, float32.

    Raises:
        EvaluationError: `encode` gives another number of tokens than the grid has.
    """
    height, width = images_B3HW.shape[-2:]
    if windows is None or (height <= windows.size and width <= windows.size):
        return _whole(encode, images_B3HW, patch_size)
    windows.check(patch_size)
    rows, columns = height // patch_size, width // patch_size
    size = windows.size
    total_BhwC: Tensor | None = None
    count_hw1 = torch.zeros(rows, columns, 1)
    for top in window_starts(height, size, windows.stride):
        for left in window_starts(width, size, windows.stride):
            crop = images_B3HW[..., top : top + size, left : left + size]
            grid_BhwC = _whole(encode, crop, patch_size)
            if total_BhwC is None:
                total_BhwC = grid_BhwC.new_zeros(len(crop), rows, columns, grid_BhwC.shape[-1])
            y, x = top // patch_size, left // patch_size
            h, w = grid_BhwC.shape[1:3]
            total_BhwC[:, y : y + h, x : x + w] += grid_BhwC
            count_hw1[y : y + h, x : x + w] += 1
    assert total_BhwC is not None  # every side has a window
    return total_BhwC / count_hw1.to(total_BhwC.device)


def _whole(encode: Encode, images_B3HW: Tensor, patch_size: int) -> Tensor:
    count, _, height, width = images_B3HW.shape
    h, w = height // patch_size, width // patch_size
    tokens_BNC = encode(images_B3HW).float()
    if tokens_BNC.ndim != 3 or tokens_BNC.shape[:2] != (count, h * w):
        raise EvaluationError(
            f"{count} images of {height}x{width} px gave tokens of shape {list(tokens_BNC.shape)}; "
            f"[{count}, {h * w}, C] was expected of {patch_size} px patches"
        )
    return tokens_BNC.reshape(count, h, w, -1)
