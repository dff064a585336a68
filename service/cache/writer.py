"""Writes to Redis behind the answers: a bounded queue and the one thread that empties it."""

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

import redis
from redis.exceptions import OutOfMemoryError

from service.cache.breaker import CircuitBreaker
from service.cache.connection import Deadline, keep
from service.cache.entry import Entry, dump
from service.cache.failures import error_kind
from service.cache.metrics import CacheMetrics, DropReason

logger = logging.getLogger(__name__)

KEY_PREFIX = "refinery:"

# One pipeline: large enough to share the way to Redis and back, small enough that Redis, which
# does one thing at a time, is free again soon for look-ups.
_BATCH_BYTES = 16 * 1024 * 1024
_BATCH_WRITES = 64
# Nobody waits for a write, so it may take longer than a look-up before it counts as a failure.
WRITE_SECONDS = 1.0
_MAX_SECONDS = 4.0
_MIN_BYTES_PER_SECOND = 16 * 1024 * 1024

Refusal = Literal["full", "other"]


@dataclass(frozen=True, slots=True)
class _Write:
    kind: Literal["store", "touch", "delete"]
    key: str
    entry: Entry | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.key) + (0 if self.entry is None else self.entry.num_bytes)


class WriteBehind:
    """Takes writes without waiting; when the queue is full, the newest is dropped and counted."""

    def __init__(
        self,
        client: redis.Redis,
        breaker: CircuitBreaker,
        metrics: CacheMetrics,
        *,
        server: str,
        ttl_seconds: int,
        max_bytes: int,
        max_writes: int,
    ) -> None:
        self._client = client
        self._breaker = breaker
        self._metrics = metrics
        self._server = server
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._max_writes = max_writes
        self._queue: deque[_Write] = deque()
        self._queued_bytes = 0
        self._refusal: Refusal | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="refinery-cache-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def store(self, key: str, entry: Entry) -> None:
        """Write the entry, to be kept until nobody has asked Redis for it for `ttl_seconds`."""
        self._add(_Write("store", key, entry))

    def touch(self, key: str) -> None:
        """Keep what is under the key for another `ttl_seconds`."""
        self._add(_Write("touch", key))

    def delete(self, key: str) -> None:
        self._add(_Write("delete", key))

    def close(self, timeout_seconds: float) -> None:
        """Write what waits, for so long, drop the rest and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_seconds)
        with self._changed:
            num_left = len(self._queue)
            self._queue.clear()
            self._count(-self._queued_bytes)
        if num_left:
            self._metrics.dropped_writes("closed", num_left)
            logger.warning(
                "redis %s did not take %d writes in the %.1f s before the service ended",
                self._server,
                num_left,
                timeout_seconds,
            )

    def _add(self, write: _Write) -> None:
        with self._changed:
            reason = self._reason_to_drop(write)
            if reason is None:
                self._queue.append(write)
                self._count(write.num_bytes)
                self._changed.notify()
        if reason is not None:
            self._metrics.dropped_writes(reason)

    def _reason_to_drop(self, write: _Write) -> DropReason | None:
        if self._is_closed:
            return "closed"
        if self._breaker.is_blocking:
            return "breaker_open"
        is_full = (
            len(self._queue) >= self._max_writes
            or self._queued_bytes + write.num_bytes > self._max_bytes
        )
        return "queue_full" if is_full else None

    def _count(self, num_bytes: int) -> None:
        self._queued_bytes += num_bytes
        self._metrics.write_queue_bytes.set(self._queued_bytes)

    def _run(self) -> None:
        while batch := self._take():
            self._write(batch)

    def _take(self) -> list[_Write]:
        """Wait for writes and take some; none when the queue is closed and empty."""
        batch: list[_Write] = []
        num_bytes = 0
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            while self._queue and len(batch) < _BATCH_WRITES:
                size = self._queue[0].num_bytes
                if batch and num_bytes + size > _BATCH_BYTES:
                    break
                batch.append(self._queue.popleft())
                num_bytes += size
            self._count(-num_bytes)
        return batch

    def _write(self, batch: list[_Write]) -> None:
        attempt = self._breaker.begin()
        if attempt is None:
            self._metrics.dropped_writes("breaker_open", len(batch))
            return
        try:
            sizes, answers = self._send(batch)
        except Exception as error:  # noqa: BLE001 - the thread must live; metrics and log hear of it
            attempt.fail(error)
            self._metrics.errors(error_kind(error))
            self._metrics.dropped_writes("error", len(batch))
            return
        attempt.succeed()
        for write, size, answer in zip(batch, sizes, answers, strict=True):
            if isinstance(answer, Exception):
                self._note_refusal(answer)
            elif write.kind == "store":
                self._note_success(size)

    def _send(self, batch: list[_Write]) -> tuple[list[int], list[object]]:
        sizes = []
        pipeline = self._client.pipeline(transaction=False)
        for write in batch:
            name = KEY_PREFIX + write.key
            data = b"" if write.entry is None else dump(write.entry, write.key)
            sizes.append(len(data))
            if write.kind == "store":
                pipeline.set(name, data, ex=self._ttl_seconds)
            elif write.kind == "touch":
                pipeline.expire(name, self._ttl_seconds)
            else:
                pipeline.delete(name)
        deadline = Deadline(
            WRITE_SECONDS, max_seconds=_MAX_SECONDS, bytes_per_second=_MIN_BYTES_PER_SECOND
        )
        with keep(deadline):
            return sizes, pipeline.execute(raise_on_error=False)

    def _note_refusal(self, error: Exception) -> None:
        # Redis answers, so this says nothing against look-ups: the breaker does not hear of it.
        self._metrics.errors(error_kind(error))
        self._metrics.dropped_writes("refused")
        refusal: Refusal = "full" if isinstance(error, OutOfMemoryError) else "other"
        if refusal == self._refusal:
            return
        self._refusal = refusal
        hint = (
            "raise its maxmemory or set maxmemory-policy allkeys-lfu"
            if refusal == "full"
            else "check that it is no read-only replica and what its user may do"
        )
        logger.warning(
            "redis %s refuses to store features, look-ups go on (%s): %s", self._server, error, hint
        )

    def _note_success(self, num_bytes: int) -> None:
        self._metrics.written_bytes.inc(num_bytes)
        if self._refusal is not None:
            self._refusal = None
            logger.info("redis %s stores features again", self._server)
