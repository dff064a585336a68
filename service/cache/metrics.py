"""Prometheus metrics of the cache, all with the prefix `refinery_cache_`."""

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Tier = Literal["memory", "redis"]
Result = Literal["hit", "miss", "error", "skipped"]
ErrorKind = Literal["timeout", "connection", "corrupt", "full", "other"]
DropReason = Literal[
    "too_large",
    "too_large_for_memory",
    "queue_full",
    "breaker_open",
    "refused",
    "error",
    "closed",
]

# Microseconds in memory, up to the second that the largest answers of Redis may take.
_SECONDS = (
    0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25,
    0.5, 1.0,
)  # fmt: skip


class CacheMetrics:
    """The metrics of one cache; every series is there from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "refinery_cache_"
        lookups = Counter(
            f"{prefix}lookups",
            "Keys looked up; skipped: not asked for, because Redis does not answer or is busy",
            ("tier", "result"),
            registry=registry,
        )
        self._lookups = {
            (tier, result): lookups.labels(tier, result)
            for tier in get_args(Tier)
            for result in get_args(Result)
        }
        errors = Counter(
            f"{prefix}errors", "Failures of Redis, all answered as misses", ("kind",),
            registry=registry,
        )  # fmt: skip
        self._errors = {kind: errors.labels(kind) for kind in get_args(ErrorKind)}
        dropped = Counter(
            f"{prefix}dropped_writes", "Writes that were given up", ("reason",), registry=registry
        )
        self._dropped = {reason: dropped.labels(reason) for reason in get_args(DropReason)}
        seconds = Histogram(
            f"{prefix}lookup_seconds", "Look-up of the keys of a request", ("tier",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._seconds = {tier: seconds.labels(tier) for tier in get_args(Tier)}
        self.bytes = Gauge(f"{prefix}bytes", "Bytes of the cache in memory", registry=registry)
        self.entries = Gauge(
            f"{prefix}entries", "Entries of the cache in memory", registry=registry
        )
        self.read_bytes = Counter(
            f"{prefix}read_bytes", "Bytes of values read from Redis", registry=registry
        )
        self.written_bytes = Counter(
            f"{prefix}written_bytes", "Bytes of values written to Redis", registry=registry
        )
        self.write_queue_bytes = Gauge(
            f"{prefix}write_queue_bytes", "Bytes that wait to be written to Redis",
            registry=registry,
        )  # fmt: skip
        self.breaker_open = Gauge(
            f"{prefix}breaker_open", "1 while Redis is left alone because it failed",
            registry=registry,
        )  # fmt: skip

    def lookups(self, tier: Tier, result: Result, count: int) -> None:
        self._lookups[tier, result].inc(count)

    def errors(self, kind: ErrorKind) -> None:
        self._errors[kind].inc()

    def dropped_writes(self, reason: DropReason, count: int = 1) -> None:
        self._dropped[reason].inc(count)

    def lookup_seconds(self, tier: Tier, seconds: float) -> None:
        self._seconds[tier].observe(seconds)
