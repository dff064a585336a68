"""Image files to token grids, the next images being read while a batch is encoded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from trainer.evaluate.images import read_image
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows, encode_grid

READ_THREADS = min(8, os.cpu_count() or 1)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")
# An image file, and (h, w) in pixels that it is encoded at.
_File = tuple[Path, tuple[int, int]]


def encode_files(
    subject: Subject, files: Sequence[_File], *, windows: Windows | None, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of one shape, in any order: the files' indices and their grids `[B, h, w, C]`.

    Raises:
        EvaluationError: an image cannot be read.
    """
    order = sorted(range(len(files)), key=lambda index: files[index][1])
    pixels = _read_ahead(order, lambda index: read_image(*files[index]), 2 * batch_size)
    for batch in _batches(order, files, batch_size):
        images_B3HW = torch.stack([next(pixels) for _ in batch])
        yield (
            batch,
            encode_grid(
                subject.encode, images_B3HW, patch_size=subject.patch_size, windows=windows
            ),
        )


def _batches(order: Sequence[int], files: Sequence[_File], batch_size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or files[index][1] != files[batch[0]][1]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _read_ahead(
    items: Iterable[_Item], read: Callable[[_Item], _Found], count: int
) -> Iterator[_Found]:
    """`map(read, items)`, up to `count` items ahead: never all of a data set at once."""
    waiting: deque[Future[_Found]] = deque()
    pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read-image")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
