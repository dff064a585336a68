"""The cache as requests see it: memory first, then Redis; and how it is made from the settings."""

import logging
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from service.cache.address import read_address, read_tls
from service.cache.entry import Entry
from service.cache.memory import MemoryCache
from service.cache.metrics import CacheMetrics
from service.cache.remote import RedisCache
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)


class FeatureCache:
    """Entries by key. Nothing that happens to it makes a request fail or wait for long."""

    def __init__(
        self,
        metrics: CacheMetrics,
        *,
        memory: MemoryCache | None = None,
        remote: RedisCache | None = None,
        max_value_bytes: int,
    ) -> None:
        """
        Args:
            max_value_bytes: Entries of more bytes are not kept, in memory or in Redis.
        """
        self._metrics = metrics
        self._memory = memory
        self._remote = remote
        self._max_value_bytes = max_value_bytes
        self._has_seen_foreign = False

    @property
    def is_enabled(self) -> bool:
        """Whether `get_many` can ever find something."""
        return self._memory is not None or self._remote is not None

    def start(self) -> None:
        """Begin; a Redis that cannot be reached is a warning in the log, a moment later."""
        if self._remote is not None:
            self._remote.start()

    async def get_many(self, keys: Sequence[str]) -> list[Entry | None]:
        """What is kept under each key, in the order of the keys; None where nothing is.

        A key may come more than once. Redis is asked once, for all that memory lacks.
        """
        found = self._look_up_in_memory(keys)
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing and self._remote is not None:
            for key, entry in (await self._remote.get_many(missing)).items():
                found[key] = entry
                if self._memory is not None:
                    self._memory.put(key, entry)
        return [found.get(key) for key in keys]

    def put(self, key: str, entry: Entry) -> None:
        """Keep the entry: in memory now, in Redis soon. Never waits, never raises.

        Nobody may write to its tensors any more.
        """
        if not self.is_enabled:
            return
        if entry.num_bytes > self._max_value_bytes:
            self._metrics.dropped_writes("too_large")
            return
        entry = entry.owning()
        if self._memory is not None:
            self._memory.put(key, entry)
        if self._remote is not None:
            self._remote.put(key, entry)

    def note_foreign(self, key: str) -> None:
        """What `get_many` found under the key is not what was put there."""
        self._metrics.errors("corrupt")
        if not self._has_seen_foreign:
            self._has_seen_foreign = True
            logger.warning(
                "the cache holds features under %s that another program wrote: they are computed "
                "anew, and further ones are only counted; who else may write to Redis?",
                key,
            )

    async def close(self, timeout_seconds: float) -> None:
        """Write what Redis has yet to get, for so long, and end all threads.

        Memory still answers afterwards, Redis is no longer asked.
        """
        if self._remote is not None:
            await self._remote.close(timeout_seconds)

    def _look_up_in_memory(self, keys: Sequence[str]) -> dict[str, Entry]:
        if self._memory is None or not keys:
            return {}
        started_at = time.perf_counter()
        unique = dict.fromkeys(keys)
        found = {key: entry for key in unique if (entry := self._memory.get(key)) is not None}
        self._metrics.lookups("memory", "hit", len(found))
        self._metrics.lookups("memory", "miss", len(unique) - len(found))
        self._metrics.lookup_seconds("memory", time.perf_counter() - started_at)
        return found


def build_cache(settings: Settings, registry: CollectorRegistry) -> FeatureCache:
    """The cache that the settings ask for, with its metrics in `registry`; `start` it.

    Raises:
        SettingsError: the settings contradict each other, or a file of theirs cannot be used.
    """
    metrics = CacheMetrics(registry)
    is_remote = settings.cache not in ("memory", "off")
    if not is_remote and (settings.cache_password_file or settings.cache_ca_file):
        raise SettingsError(
            f"--cache-password-file and --cache-ca-file are for Redis, and --cache is "
            f"{settings.cache}: leave them out, or give --cache redis://host"
        )
    if settings.cache == "memory" and settings.cache_bytes == 0:
        raise SettingsError("--cache memory keeps nothing in 0 bytes: give --cache off")
    memory = None
    if settings.cache != "off" and settings.cache_bytes > 0:
        memory = MemoryCache(settings.cache_bytes, metrics)
    return FeatureCache(
        metrics,
        memory=memory,
        remote=_build_remote(settings, metrics) if is_remote else None,
        max_value_bytes=settings.cache_max_value_bytes,
    )


def _build_remote(settings: Settings, metrics: CacheMetrics) -> RedisCache:
    address = read_address(settings.cache, settings.cache_password_file)
    if address.password is not None and settings.cache_password_file is None:
        logger.warning(
            "--cache has a password in its URL, where others can read it: use --cache-password-file"
        )
    return RedisCache(
        address,
        metrics,
        tls=read_tls(address, settings.cache_ca_file),
        ttl_seconds=settings.cache_ttl_seconds,
        max_value_bytes=settings.cache_max_value_bytes,
    )
