"""Image files to token grids, the next images being read while a batch is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.images import read_image
from trainer.evaluate.reading import read_ahead
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows, encode_grid

# An image file, and (h, w) in pixels that it is encoded at.
_File = tuple[Path, tuple[int, int]]


def encode_files(
    subject: Subject, files: Sequence[_File], *, windows: Windows | None, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of one shape, in any order: the files' indices and their grids `[B, h, w, C]`.

    Raises:
        EvaluationError: an image cannot be read, or a batch has no room on the device.
    """
    order = sorted(range(len(files)), key=lambda index: files[index][1])
    pixels = read_ahead(order, lambda index: read_image(*files[index]), count=2 * batch_size)
    for batch in _batches(order, files, batch_size):
        images_B3HW = torch.stack([next(pixels) for _ in batch])
        try:
            grid_BhwC = encode_grid(
                subject.encode, images_B3HW, patch_size=subject.patch_size, windows=windows
            )
        except torch.OutOfMemoryError as error:
            height, width = images_B3HW.shape[-2:]
            raise EvaluationError(
                f"{subject.name} has no room on its device for {len(batch)} images of "
                f"{height}x{width} px at once; give a smaller --batch-size, or --window SIZE STRIDE"
            ) from error
        yield batch, grid_BhwC


def _batches(order: Sequence[int], files: Sequence[_File], batch_size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or files[index][1] != files[batch[0]][1]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
