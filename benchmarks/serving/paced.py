"""Open loops: latency and goodput at given shares of the knee's rate.

O1  Poisson at 50, 80 and 100 % of the knee, with cache hits of 0, 50 and 95 %
O2  bursts at 80 % of the knee, with half hits
X1  twice the knee, then half of it: how overload is bounded, and how fast it is over
"""

import math
import statistics

from benchmarks.load import Load, Sample, arrivals, closed_loop, open_loop
from benchmarks.serving.bench import Bench
from benchmarks.serving.measure import (
    Figures,
    livez,
    memory_figures,
    open_summary,
)
from benchmarks.serving.outcome import Outcome, Table, livez_table, load_table, stage_table
from benchmarks.serving.processes import ServerProcess
from benchmarks.serving.watch import watching

_HIT_RATES = (0.0, 0.5, 0.95)
_GOODPUT_SHARE = 0.99
_BURSTINESS = 0.25
_SLO_LATENCIES = 10  # times the latency of one request alone, when no --slo-ms is given
_QUEUE_SECONDS = 2.0
_RECOVERY_SECONDS = 10.0
_BACK = 1.5  # times the latency before
_DEADLINE_SLACK_SECONDS = 0.1


def o1(bench: Bench) -> Outcome:
    """Poisson arrivals at shares of the knee's rate."""
    outcome = Outcome("O1", "open loop, Poisson, mixed sizes, hit rates of 0, 50 and 95 %")
    rows: list[tuple[str, Figures]] = []
    knees: Figures = {}
    with bench.service() as server:
        slo = _slo_seconds(bench, server)
        for hit_rate in _HIT_RATES:
            traffic = bench.mixed_traffic(hit_rate=hit_rate)
            knee, _ = bench.find_knee(server, traffic)
            knees[f"{hit_rate:.0%}"] = knee._asdict()
            for share in bench.arguments.shares:
                rate = share * knee.rate
                offsets = arrivals(rate=rate, seconds=bench.seconds(300), seed=bench.arguments.seed)
                load = open_loop(server.target, traffic, offsets)
                figures = open_summary(load, offsets, slo_seconds=slo)
                name = f"{hit_rate:.0%} hits, {share:.0%} of {knee.rate:.1f}/s"
                rows.append((name, figures | {"hit_rate": hit_rate, "share": share}))
    outcome.figures = {"knees": knees, "runs": dict(rows)}
    outcome.tables = [
        load_table("open loop, Poisson; latency from the scheduled time", rows),
        _goodput_table(rows),
        stage_table("stages, mean ms", rows),
    ]
    for name, figures in rows:
        if figures["share"] == 0.8:
            _check_goodput(outcome, name, figures)
    return outcome


def o2(bench: Bench) -> Outcome:
    """Bursts at 80 % of the knee's rate."""
    outcome = Outcome("O2", "open loop, gamma arrivals of shape 0.25, mixed sizes, half hits")
    with bench.service() as server:
        traffic = bench.mixed_traffic(hit_rate=0.5)
        slo = _slo_seconds(bench, server)
        knee, _ = bench.find_knee(server, traffic)
        offsets = arrivals(
            rate=0.8 * knee.rate,
            seconds=bench.seconds(300),
            burstiness=_BURSTINESS,
            seed=bench.arguments.seed,
        )
        with watching(server.url, server.pid) as watch:
            load = open_loop(server.target, traffic, offsets)
    figures = open_summary(load, offsets, slo_seconds=slo)
    outcome.figures = {"knee": knee._asdict(), "bursts": figures, "livez": livez(watch)}
    rows = [(f"80 % of {knee.rate:.1f}/s in bursts", figures)]
    outcome.tables = [
        load_table("open loop, bursts", rows),
        _goodput_table(rows),
        stage_table("stages, mean ms", rows),
        livez_table([("bursts", outcome.figures["livez"])]),
    ]
    bad = [sample for sample in load.samples if sample.status >= 500 or sample.status == 0]
    outcome.check("no 5xx, every request answered", f"{len(bad)} of {len(load.samples)}", not bad)
    _check_retry_after(outcome, load.samples)
    return outcome


def x1(bench: Bench) -> Outcome:
    """Overload and what comes after it."""
    deadline = bench.arguments.deadline_ms / 1e3
    outcome = Outcome(
        "X1",
        f"half the knee, twice the knee, half again; deadline {deadline:g} s by x-deadline-ms, "
        f"--queue-seconds {_QUEUE_SECONDS:g}",
    )
    seconds = bench.seconds(60)
    with bench.service("--queue-seconds", str(_QUEUE_SECONDS)) as server:
        knee, _ = bench.find_knee(server, bench.traffic())
        traffic = bench.traffic(headers=f"x-deadline-ms: {bench.arguments.deadline_ms}\r\n")
        closed_loop(server.target, traffic, clients=4, seconds=1)
        phases = [("before", 0.5), ("overload", 2.0), ("after", 0.5)]
        offsets: list[float] = []
        for number, (_, share) in enumerate(phases):
            offsets += arrivals(
                rate=share * knee.rate, seconds=seconds, start=number * seconds, seed=number
            )
        with watching(server.url, server.pid) as watch:
            load = open_loop(server.target, traffic, offsets)
    parts = {
        name: _between(load, number * seconds, (number + 1) * seconds)
        for number, (name, _) in enumerate(phases)
    }
    rows = [
        (name, open_summary(part, [s.due - part.started for s in part.samples]))
        for name, part in parts.items()
    ]
    recovery = _recovery_seconds(parts["before"], parts["after"])
    outcome.figures = {
        "knee": knee._asdict(),
        "phases": dict(rows),
        "recovery_seconds": recovery,
        "livez": livez(watch),
        "memory": memory_figures(watch.memory),
    }
    outcome.tables = [
        load_table(f"open loop around a knee of {knee.rate:.1f}/s", rows),
        livez_table([("all of it", outcome.figures["livez"])]),
    ]
    p99 = dict(rows)["overload"]["latency_ms"].get("p99", float("inf"))
    outcome.check(
        f"p99 of admitted requests <= the deadline of {deadline:g} s",
        f"{p99:.0f} ms",
        p99 <= (deadline + _DEADLINE_SLACK_SECONDS) * 1e3,
    )
    outcome.check(
        f"back to {_BACK:g} times the median latency before in < {_RECOVERY_SECONDS:g} s",
        f"{recovery:.0f} s",
        recovery < _RECOVERY_SECONDS,
    )
    refused = sum(sample.status == 429 for sample in parts["overload"].samples)
    outcome.check("overload is refused with 429", f"{refused} requests", refused > 0)
    _check_retry_after(outcome, load.samples)
    return outcome


def _slo_seconds(bench: Bench, server: ServerProcess) -> float:
    """`--slo-ms`, or what a mixed image takes that is new and alone, times some."""
    if bench.arguments.slo_ms:
        return float(bench.arguments.slo_ms) / 1e3
    traffic = bench.mixed_traffic()
    closed_loop(server.target, traffic, clients=1, seconds=1)
    alone = closed_loop(server.target, traffic, clients=1, seconds=bench.short(10))
    return _SLO_LATENCIES * _median_latency(alone.samples)


def _between(load: Load, start: float, end: float) -> Load:
    """The part of a run whose requests were due between two times from its start."""
    samples = [s for s in load.samples if start <= s.due - load.started < end]
    return Load(load.started + start, load.started + end, samples)


def _recovery_seconds(before: Load, after: Load) -> float:
    """From the end of the overload to the first second that is as fast as before; inf: never."""
    usual = _median_latency(before.samples)
    for second in range(int(after.seconds)):
        window = _between(after, second, second + 1).samples
        if window and _median_latency(window) <= _BACK * usual:
            return float(second)
    return math.inf


def _median_latency(samples: list[Sample]) -> float:
    latencies = [sample.latency for sample in samples if sample.status == 200]
    return statistics.median(latencies) if latencies else float("inf")


def _goodput_table(rows: list[tuple[str, Figures]]) -> Table:
    return Table(
        "goodput: answered with 200 within the objective, of those offered",
        ("", "objective, ms", "offered/s", "goodput/s", "share", "generator late, p99 ms", "hits"),
        [
            [
                name,
                f"{figures['slo_ms']:.0f}",
                f"{figures['offered']:.1f}",
                f"{figures['goodput']:.1f}",
                f"{figures['goodput_share']:.2%}",
                f"{figures['lag_p99_ms']:.1f}" + (" VOID" if figures["is_void"] else ""),
                f"{figures['cache'].get('hit', 0) / max(1, sum(figures['cache'].values())):.0%}",
            ]
            for name, figures in rows
        ],
    )


def _check_goodput(outcome: Outcome, name: str, figures: Figures) -> None:
    if figures["is_void"]:
        outcome.check(f"goodput, {name}", "void: the generator missed its rate", None)
        return
    share = figures["goodput_share"]
    outcome.check(
        f"goodput >= {_GOODPUT_SHARE:.0%} of offered, {name}",
        f"{share:.2%} within {figures['slo_ms']:.0f} ms",
        share >= _GOODPUT_SHARE,
    )


def _check_retry_after(outcome: Outcome, samples: list[Sample]) -> None:
    refused = [sample for sample in samples if sample.status == 429]
    without = sum(b"retry-after" not in sample.headers for sample in refused)
    outcome.check(
        "every 429 has Retry-After", f"{without} of {len(refused)} are without", without == 0
    )
