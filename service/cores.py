"""Cores that the engines of a device share.

Images side by side use a CPU better than the parts of one image: its matrices are small, and its
threads wait for each other at every layer. So a CPU has several engines. One that works alone gets
all threads; the more work at a time, the fewer each begins with.
"""

import threading


class Cores:
    """Threads for the engines of one device; safe to use from any thread."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_busy = 0
        self._lock = threading.Lock()

    @property
    def num_busy(self) -> int:
        """Engines that are working."""
        return self._num_busy

    def enter(self) -> int:
        """Begin to work; returns with how many threads."""
        with self._lock:
            self._num_busy += 1
            return max(1, self._num_threads // self._num_busy)

    def leave(self) -> None:
        """Work no more."""
        with self._lock:
            self._num_busy -= 1
