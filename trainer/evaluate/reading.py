"""Reading files by several threads, and tensors that are read when they are asked for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, overload

from torch import Tensor

READ_THREADS = min(8, os.cpu_count() or 1)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def read_ahead(
    items: Iterable[_Item], read: Callable[[_Item], _Found], *, count: int = 2 * READ_THREADS
) -> Iterator[_Found]:
    """`map(read, items)`, up to `count` items ahead: never all of a data set at once."""
    waiting: deque[Future[_Found]] = deque()
    pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class LazyTensors(Sequence[Tensor]):
    """A sequence whose members are read when they are asked for, and not kept.

    Args:
        length: How many there are.
        read: The member of an index from 0; called by several threads at a time.
    """

    def __init__(self, length: int, read: Callable[[int], Tensor]) -> None:
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Tensor]:
        return read_ahead(range(self._length), self._read)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self._read(each) for each in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of {self._length} tensors")
        return self._read(index % self._length)
