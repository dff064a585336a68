"""Cores that the engines of a device share.

Images side by side use a CPU better than the parts of one image: its matrices are small, and its
threads wait for each other at every layer. So a CPU has several engines. One that works alone gets
all threads; those that work at the same time share them, and go on doing so for a moment when one
of them is between two batches.
"""

import threading
import time
from collections.abc import Callable

_MEMORY_SECONDS = 0.5


class Cores:
    """Threads for the engines of one device; safe to use from any thread."""

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_threads = num_threads
        self._clock = clock
        self._num_busy = 0
        self._peak = 0  # most engines that worked at a time, lately
        self._peak_at = 0.0
        self._lock = threading.Lock()

    @property
    def num_busy(self) -> int:
        """Engines that are working."""
        return self._num_busy

    def enter(self) -> int:
        """Begin to work; returns with how many threads."""
        with self._lock:
            self._num_busy += 1
            now = self._clock()
            if self._num_busy >= self._peak or now - self._peak_at > _MEMORY_SECONDS:
                self._peak, self._peak_at = self._num_busy, now
            return max(1, self._num_threads // self._peak)

    def leave(self) -> None:
        """Work no more."""
        with self._lock:
            self._num_busy -= 1
