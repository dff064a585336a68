"""The cache in Redis, shared by replicas; a Redis that fails in any way is only a slower miss.

Threads do the work, because values are megabytes: the event loop starts a look-up and hears of its
end. Between them stands a circuit breaker, so a dead Redis costs a wait only now and then.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from service.cache.address import RedisAddress
from service.cache.breaker import Attempt, CircuitBreaker
from service.cache.connection import Deadline, DeadlineConnection, keep, open_client
from service.cache.entry import CorruptEntryError, Entry, load
from service.cache.failures import error_kind
from service.cache.metrics import CacheMetrics
from service.cache.replies import read_values
from service.cache.writer import KEY_PREFIX, WRITE_SECONDS, WriteBehind

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 0.05
READ_SECONDS = 0.1
# More than the failures that open the breaker: threads that hang in the name service open it too.
_NUM_THREADS = 8
# How long a look-up may wait for a thread.
_QUEUE_SECONDS = 0.1
# A look-up of many large values may take longer than the timeouts, as long as they flow.
_MAX_SECONDS = 1.0
_MIN_BYTES_PER_SECOND = 64 * 1024 * 1024
# How long a thread may take to connect, for the requests after the one that gave it up.
_PATIENT_SECONDS = 1.0
# The thread tells its own timeout a little before the event loop gives it up.
_GRACE_SECONDS = 0.02
_QUEUE_BYTES = 64 * 1024 * 1024
_QUEUE_WRITES = 1024


@dataclass(slots=True, eq=False)
class _LookUp:
    keys: Sequence[str]
    attempt: Attempt
    deadline: Deadline | None = None  # set when a thread begins


class RedisCache:
    """Entries by key in a Redis. No method raises because of what Redis does or does not do."""

    def __init__(
        self,
        address: RedisAddress,
        metrics: CacheMetrics,
        *,
        tls: ssl.SSLContext | None = None,
        ttl_seconds: int,
        max_value_bytes: int,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        max_queue_bytes: int = _QUEUE_BYTES,
        max_queue_writes: int = _QUEUE_WRITES,
    ) -> None:
        """
        Args:
            tls: How to speak TLS, of `read_tls`; None: not at all.
            ttl_seconds: How long Redis keeps a value that it is not asked for.
            max_value_bytes: Bytes of the largest entry that will be put.
            connect_seconds: Longest wait for a connection.
            read_seconds: Longest wait for the next piece of an answer. A look-up takes at most
                that long as a whole, and a second where large values flow; one that needs a new
                connection waits for it for at most the sum of both.
            max_queue_bytes: Most bytes that wait to be written; two of the largest values always
                may.
            max_queue_writes: Most writes that wait.
        """
        self._server = str(address)
        self._metrics = metrics
        self._connect_seconds = connect_seconds + read_seconds
        self._read_seconds = read_seconds
        self._client = open_client(
            address,
            tls=tls,
            connect_seconds=connect_seconds,
            read_seconds=read_seconds,
            max_connections=_NUM_THREADS,
        )
        self._write_client = open_client(
            address,
            tls=tls,
            connect_seconds=connect_seconds,
            read_seconds=WRITE_SECONDS,
            max_connections=1,
        )
        self._breaker = CircuitBreaker(self._server, metrics)
        self._writer = WriteBehind(
            self._write_client,
            self._breaker,
            metrics,
            server=self._server,
            ttl_seconds=ttl_seconds,
            max_bytes=max(max_queue_bytes, 2 * max_value_bytes),
            max_writes=max_queue_writes,
        )
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="refinery-cache")
        self._has_seen_corruption = False

    def __repr__(self) -> str:
        return f"RedisCache({self._server})"

    def start(self) -> None:
        """Begin to write, and warn, a moment later, if Redis does not answer."""
        self._writer.start()
        self._pool.submit(self._greet)

    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """The entries of those keys, each given once, that Redis has, by one MGET."""
        started_at = time.perf_counter()
        attempt = self._breaker.begin()
        if attempt is None:
            self._metrics.lookups("redis", "skipped", len(keys))
            return {}
        found = await self._look_up(_LookUp(keys, attempt))
        self._metrics.lookup_seconds("redis", time.perf_counter() - started_at)
        return found

    def put(self, key: str, entry: Entry) -> None:
        """Have the entry written behind; a full queue drops it."""
        self._writer.store(key, entry)

    async def close(self, timeout_seconds: float) -> None:
        """Write what waits, for so long, and end the threads. Look-ups are skipped from now on."""
        loop = asyncio.get_running_loop()
        end = time.monotonic() + timeout_seconds
        await loop.run_in_executor(None, self._writer.close, timeout_seconds)
        self._pool.shutdown(wait=False, cancel_futures=True)
        ended = loop.run_in_executor(None, self._pool.shutdown)
        _, running = await asyncio.wait({ended}, timeout=max(end - time.monotonic(), 0.1))
        if running:
            logger.warning("a look-up in redis %s still hangs; leaving it behind", self._server)
            return
        self._client.close()
        self._write_client.close()

    async def _look_up(self, lookup: _LookUp) -> dict[str, Entry]:
        num_keys = len(lookup.keys)
        try:
            future = self._pool.submit(self._run, lookup)
        except RuntimeError:  # closed
            lookup.attempt.abandon()
            self._metrics.lookups("redis", "skipped", num_keys)
            return {}
        try:
            await _wait(future, lookup)
        except asyncio.CancelledError:
            if future.cancel():
                lookup.attempt.abandon()
            raise
        if future.cancel():
            self._note_no_thread(lookup)
            self._metrics.lookups("redis", "skipped", num_keys)
            return {}
        found = future.result() if future.done() else None
        if found is None:
            # A thread that failed has said so already; one that still hangs has not.
            self._fail(lookup.attempt, TimeoutError("the look-up as a whole took too long"))
            self._metrics.lookups("redis", "error", num_keys)
            return {}
        self._metrics.lookups("redis", "hit", len(found))
        self._metrics.lookups("redis", "miss", num_keys - len(found))
        return found

    def _run(self, lookup: _LookUp) -> dict[str, Entry] | None:
        """In a thread: what Redis has of the keys; None when it fails. Never raises."""
        lookup.deadline = _deadline(self._connect_seconds)
        try:
            values = self._ask(lookup)
        except Exception as error:  # noqa: BLE001 - a miss whatever it is; metrics and breaker hear of it
            self._fail(lookup.attempt, error)
            return None
        if values is None:
            return None
        lookup.attempt.succeed()
        found = {}
        for key, value in zip(lookup.keys, values, strict=True):
            if value is None:
                continue
            self._metrics.read_bytes.inc(len(value))
            try:
                found[key] = load(value, key)
            except CorruptEntryError as error:
                self._note_corruption(key, error)
            else:
                self._writer.touch(key)
        return found

    def _ask(self, lookup: _LookUp) -> list[memoryview | None] | None:
        """One MGET; None when the request has gone before it could be sent."""
        pool = self._client.connection_pool
        # With more patience than the request: else a Redis to which TLS takes a little too long
        # would never be used.
        with keep(_deadline(_PATIENT_SECONDS)):
            connection = pool.get_connection()
        assert isinstance(connection, DeadlineConnection)
        try:
            if lookup.attempt.is_settled:
                return None
            lookup.deadline = _deadline(self._read_seconds)
            with keep(lookup.deadline):
                names = [KEY_PREFIX + key for key in lookup.keys]
                connection.send_command("MGET", *names)  # type: ignore[no-untyped-call]
                return read_values(connection, len(lookup.keys))
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            pool.release(connection)

    def _note_no_thread(self, lookup: _LookUp) -> None:
        # All threads are busy, which says nothing about Redis, unless it has failed already.
        if lookup.attempt.is_probe:
            lookup.attempt.fail(TimeoutError("all look-ups still hang"))
        else:
            lookup.attempt.abandon()

    def _note_corruption(self, key: str, error: CorruptEntryError) -> None:
        self._metrics.errors("corrupt")
        self._writer.delete(key)
        if not self._has_seen_corruption:
            self._has_seen_corruption = True
            logger.warning(
                "redis %s holds a value that is not what was written (%s): it is deleted, and "
                "further ones are only counted",
                self._server,
                error,
            )

    def _greet(self) -> None:
        """In a thread: say it when Redis cannot be used from the start."""
        attempt = self._breaker.begin()
        if attempt is None:
            return
        try:
            with keep(_deadline(_PATIENT_SECONDS)):
                self._client.ping()
        except Exception as error:  # noqa: BLE001 - the log hears of it
            self._fail(attempt, error)
            logger.warning(
                "redis %s cannot be used now (%s: %s); requests go on without it, and it is used "
                "as soon as it answers",
                self._server,
                type(error).__name__,
                error,
            )
            return
        attempt.succeed()
        logger.info("redis %s is the shared cache", self._server)

    def _fail(self, attempt: Attempt, error: Exception) -> None:
        if attempt.fail(error):
            self._metrics.errors(error_kind(error))


def _deadline(seconds: float) -> Deadline:
    return Deadline(seconds, max_seconds=_MAX_SECONDS, bytes_per_second=_MIN_BYTES_PER_SECOND)


async def _wait(future: "Future[dict[str, Entry] | None]", lookup: _LookUp) -> None:
    """Wait for a thread to begin, and then until its deadline."""
    answer = asyncio.wrap_future(future)
    await asyncio.wait({answer}, timeout=_QUEUE_SECONDS)
    while not answer.done() and lookup.deadline is not None:
        remaining = lookup.deadline.remaining() + _GRACE_SECONDS
        if remaining <= 0:
            return
        await asyncio.wait({answer}, timeout=remaining)
