"""The cache in this process: least recently used, bounded in bytes."""

import threading
from collections import OrderedDict

from service.cache.entry import Entry
from service.cache.metrics import CacheMetrics

# Of the objects around an entry; without it entries without tensors would cost nothing and never
# be pushed out.
OVERHEAD_BYTES = 1024
# A value that pushes out a quarter of all others is worth less than they are.
_LARGEST_PART = 4


class MemoryCache:
    """Entries by key; safe to use from any thread.

    `get` and `put` take the same time however many entries there are: a stream in which nothing
    is ever asked for twice pays for one entry that comes and one that goes.
    """

    def __init__(self, max_bytes: int, metrics: CacheMetrics) -> None:
        """
        Args:
            max_bytes: Most bytes of entries, with about 1 KiB for the objects around each.
        """
        self.max_bytes = max_bytes
        self._metrics = metrics
        self._entries: OrderedDict[str, tuple[Entry, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, key: str) -> Entry | None:
        """The entry, which becomes the last one to be pushed out."""
        with self._lock:
            kept = self._entries.get(key)
            if kept is None:
                return None
            self._entries.move_to_end(key)
            return kept[0]

    def put(self, key: str, entry: Entry) -> bool:
        """Keep the entry in place of one under the same key; those not used for longest make room.

        Returns:
            Whether it is kept: one of more than a quarter of the bytes is not, which is counted.
        """
        cost = entry.num_bytes + len(key) + OVERHEAD_BYTES
        with self._lock:
            replaced = self._entries.pop(key, None)
            if replaced is not None:
                self._num_bytes -= replaced[1]
            is_kept = cost * _LARGEST_PART <= self.max_bytes
            if is_kept:
                self._entries[key] = entry, cost
                self._num_bytes += cost
            while self._num_bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._num_bytes -= freed
            self._metrics.bytes.set(self._num_bytes)
            self._metrics.entries.set(len(self._entries))
        if not is_kept:
            self._metrics.dropped_writes("too_large_for_memory")
        return is_kept

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0
            self._metrics.bytes.set(0)
            self._metrics.entries.set(0)
