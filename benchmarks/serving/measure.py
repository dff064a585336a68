"""Runs of requests as figures: percentiles, goodput, stages, the knee of a curve, flat memory."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load import Load, Sample, Target, closed_loop
from benchmarks.serving.images import Traffic
from benchmarks.serving.processes import get
from benchmarks.serving.watch import Memory, Watch

Figures = dict[str, Any]

PERCENTS = (50, 90, 95, 99, 99.9)
KNEE_SHARE = 0.95  # of the best throughput
# A generator that was late for its schedule did not offer the load that it says it did.
_MAX_LAG_SECONDS = 0.05
_MIN_RATE_SHARE = 0.98
_FLAT_GROWTH = 0.03
_MIN_MEMORY_SAMPLES = 20  # one a second
_STAGE = re.compile(r"([\w-]+);dur=([\d.]+)")
_WARM_UP_SECONDS = 3.0


class Knee(NamedTuple):
    """The smallest concurrency with at least `KNEE_SHARE` of the best throughput."""

    concurrency: int
    rate: float  # images/s


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds; empty when nothing was answered."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds), [*PERCENTS, 100]) * 1e3
    names = [f"p{percent}" for percent in PERCENTS]
    return {name: float(value) for name, value in zip([*names, "max"], values, strict=True)}


def summary(load: Load, *, slo_seconds: float | None = None) -> Figures:
    """What a run was: rates per second, latencies of good answers in ms, answers by status."""
    answered = load.answered
    figures: Figures = {
        "requests": len(load.samples),
        "seconds": load.seconds,
        "rate": load.rate,
        "latency_ms": percentiles([sample.latency for sample in answered]),
        "statuses": dict(Counter(outcome(sample) for sample in load.samples)),
        "stage_ms": _stages(answered),
        "cache": dict(Counter(_header(sample, b"x-cache") for sample in answered)),
        "response_bytes": statistics.mean([s.received_bytes for s in answered] or [0]),
        "received_bytes_per_second": sum(s.received_bytes for s in answered) / load.seconds,
        "by_kind": by_kind(load.samples),
    }
    if slo_seconds is not None:
        good = sum(sample.latency <= slo_seconds for sample in answered)
        figures["slo_ms"] = slo_seconds * 1e3
        figures["goodput"] = good / load.seconds
        figures["goodput_share"] = good / max(1, len(load.samples))
    return figures


def open_summary(
    load: Load, offsets: Sequence[float], *, slo_seconds: float | None = None
) -> Figures:
    """As `summary`, of an open loop; `is_void` when the generator missed its rate."""
    lags = [sample.sent - sample.due for sample in load.samples]
    lag = float(np.percentile(lags, 99))
    achieved = len(offsets) / load.seconds
    offered = len(offsets) / offsets[-1]
    return summary(load, slo_seconds=slo_seconds) | {
        "offered": offered,
        "achieved_share": achieved / offered,
        "lag_p99_ms": lag * 1e3,
        "is_void": lag > _MAX_LAG_SECONDS or achieved < _MIN_RATE_SHARE * offered,
    }


def outcome(sample: Sample) -> str:
    """Its status, or why there is none."""
    return str(sample.status) if sample.status else sample.failure


def by_kind(samples: Iterable[Sample]) -> dict[str, Figures]:
    """Latencies and statuses of each kind of job."""
    kinds: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[sample.kind].append(sample)
    return {
        kind: {
            "requests": len(of_kind),
            "statuses": dict(Counter(outcome(sample) for sample in of_kind)),
            "latency_ms": percentiles([s.latency for s in of_kind if s.status == 200]),
        }
        for kind, of_kind in sorted(kinds.items())
    }


def sweep(target: Target, traffic: Traffic, levels: Sequence[int], seconds: float) -> list[Figures]:
    """A closed loop at each concurrency of `levels`, after a warm-up that is not counted."""
    closed_loop(target, traffic.warm_up, clients=4)
    closed_loop(target, traffic, clients=4, seconds=min(_WARM_UP_SECONDS, seconds))
    return [
        {
            "concurrency": level,
            **summary(closed_loop(target, traffic, clients=level, seconds=seconds)),
        }
        for level in levels
    ]


def knee_of(points: Sequence[Figures]) -> Knee:
    """The knee of a sweep's throughput curve."""
    best = max(point["rate"] for point in points)
    point = next(point for point in points if point["rate"] >= KNEE_SHARE * best)
    return Knee(point["concurrency"], point["rate"])


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images/s of each contender in each round, in turn: a busy machine disturbs all alike."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            rates[name].append(contender())
    return rates


def median_ratio(rates: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def queue_p99_ms(offsets: Iterable[float], *, rate: float) -> float:
    """p99 latency in ms of the same arrivals at a server without any overhead.

    It takes requests in order, one at a time, each 1 / `rate` seconds: what a model that gains
    nothing from batches could do at best.
    """
    free, latencies = 0.0, []
    for offset in offsets:
        free = max(free, offset) + 1 / rate
        latencies.append(free - offset)
    return percentiles(latencies)["p99"]


def livez(watch: Watch) -> Figures:
    """Latency of the probes in ms; those without a good answer; how late the prober was woken."""
    return {
        "probes": len(watch.probes),
        "failed": sum(probe.status != 200 for probe in watch.probes),
        "latency_ms": percentiles([probe.seconds for probe in watch.probes]),
        "prober_lateness_ms": percentiles([probe.lateness for probe in watch.probes]),
    }


def growth(memory: Sequence[Memory]) -> float | None:
    """Growth of the resident memory in the second half of a run.

    The median of its last fifth over the median of its middle fifth, less 1; None for a run that
    is too short to tell.
    """
    if len(memory) < _MIN_MEMORY_SAMPLES:
        return None
    rss = [point.rss_bytes for point in memory]
    fifth = len(rss) // 5
    middle, last = rss[2 * fifth : 3 * fifth], rss[-fifth:]
    return statistics.median(last) / statistics.median(middle) - 1


def flatness(memory: Sequence[Memory]) -> tuple[str, str, bool | None]:
    """Criterion, measured and passed of memory that is to stay flat."""
    criterion = f"memory is flat: grows by <= {_FLAT_GROWTH:.0%} in the second half"
    grown = growth(memory)
    if grown is None:
        return criterion, f"{len(memory)} s are too short to tell", None
    first, last = memory[0], memory[-1]
    measured = (
        f"{grown:+.1%}; {first.rss_bytes / 2**20:.0f} MiB at first, {last.rss_bytes / 2**20:.0f} "
        f"at last, threads {first.num_threads} and {last.num_threads}, files {first.num_files} "
        f"and {last.num_files}"
    )
    return criterion, measured, grown <= _FLAT_GROWTH


def memory_figures(memory: Sequence[Memory]) -> Figures:
    """Resident memory, threads and open files over a run."""
    if not memory:
        return {}
    return {
        "rss_mib_first": memory[0].rss_bytes / 2**20,
        "rss_mib_last": memory[-1].rss_bytes / 2**20,
        "rss_mib_max": max(point.rss_bytes for point in memory) / 2**20,
        "growth_of_second_half": growth(memory),
        "threads": [memory[0].num_threads, memory[-1].num_threads],
        "files": [memory[0].num_files, memory[-1].num_files],
        "rss_mib": [
            (round(point.at - memory[0].at, 1), round(point.rss_bytes / 2**20, 1))
            for point in memory
        ],
    }


def metric(url: str, name: str) -> float:
    """A metric of the service, summed over its labels.

    Raises:
        SystemExit: there is no such metric.
    """
    pattern = rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
    values = re.findall(pattern, get(url + "/metrics"), re.MULTILINE)
    if not values:
        raise SystemExit(f"{url}/metrics has no {name}")
    return sum(map(float, values))


def _stages(samples: Iterable[Sample]) -> dict[str, Figures]:
    times: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for stage, milliseconds in _STAGE.findall(_header(sample, b"server-timing")):
            times[stage].append(float(milliseconds))
    return {
        stage: {
            "mean": statistics.mean(values),
            "p50": statistics.median(values),
            "p99": float(np.percentile(values, 99)),
        }
        for stage, values in times.items()
    }


def _header(sample: Sample, name: bytes) -> str:
    return sample.headers.get(name, b"").decode("latin-1")
