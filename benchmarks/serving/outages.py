"""Parts that fail under load: Redis, the process itself, the device.

X5  Redis paused, killed and started again, at a hit rate of 95 %
X6  SIGTERM at 80 % of the knee
X8  a CUDA error, planted where there is no CUDA
"""

import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.load import Load, Sample, arrivals, closed_loop, open_loop
from benchmarks.serving.bench import Bench
from benchmarks.serving.images import Traffic
from benchmarks.serving.measure import Figures, livez, open_summary
from benchmarks.serving.measure import outcome as outcome_of
from benchmarks.serving.outcome import Outcome, Table, livez_table, load_table
from benchmarks.serving.processes import Redis, ServerProcess, redis
from benchmarks.serving.watch import watching

_TIMEOUTS_SECONDS = 0.15  # of the cache: to connect, 50 ms, and to read, 100 ms
_NOISE = 1.25
_EXIT_SECONDS = 30
_DRAIN_SECONDS = 30
_LIVEZ_SECONDS = 10
_UNSURE_SECONDS = 0.1  # sent so shortly before a signal that the server may not have begun
# So many requests that shortly before the signal, but long enough to have been admitted.
_BURST, _BURST_SECONDS = 8, 0.15


class Later:
    """Does something in a while, and notes when."""

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.at = 0.0
        self._action = action
        self._timer = threading.Timer(seconds, self._act)
        self._timer.start()

    def join(self) -> None:
        self._timer.join()

    def _act(self) -> None:
        self.at = time.perf_counter()
        self._action()


class ExitWatch:
    """When and how a server ended."""

    def __init__(self, server: ServerProcess) -> None:
        self.at = 0.0
        self.status: int | None = None
        self._thread = threading.Thread(target=self._wait, args=(server,), daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _wait(self, server: ServerProcess) -> None:
        while (status := server.status) is None:
            time.sleep(0.02)
        self.at, self.status = time.perf_counter(), status


def x5(bench: Bench) -> Outcome:
    """A shared cache that fails."""
    outcome = Outcome(
        "X5", "open loop at half the knee of misses, 95 % hits in Redis alone (--cache-bytes 0)"
    )
    if not Redis.is_installed():
        outcome.check("Redis can be started", "there is no redis-server; install it", None)
        return outcome
    seconds = bench.seconds(30)
    runs: dict[str, Figures] = {}
    with redis() as cache, bench.service("--cache", cache.url, "--cache-bytes", "0") as server:
        knee, _ = bench.find_knee(server, bench.traffic())
        traffic = bench.traffic(hit_rate=0.95)

        def measure(name: str, jobs: Traffic) -> None:
            offsets = arrivals(rate=0.5 * knee.rate, seconds=seconds, seed=bench.arguments.seed)
            load = open_loop(server.target, jobs, offsets)
            runs[name] = open_summary(load, offsets)

        closed_loop(server.target, traffic.warm_up, clients=4)
        time.sleep(1)  # values are written behind the answers
        measure("Redis works", traffic)
        measure("Redis works, no hits", bench.traffic())
        cache.signal(signal.SIGSTOP)
        measure("Redis paused", traffic)
        cache.signal(signal.SIGCONT)
        time.sleep(bench.short(12))  # a breaker that opened has closed again
        measure("Redis goes on", traffic)
        cache.kill()
        measure("Redis killed", traffic)
        cache.start()
        time.sleep(bench.short(12))
        closed_loop(server.target, traffic.warm_up, clients=4)
        time.sleep(1)
        measure("Redis started again", traffic)
    outcome.figures = {"knee": knee._asdict(), "runs": runs}
    outcome.tables = [
        load_table("open loop", list(runs.items())),
        Table(
            "x-cache of the answers",
            ("", "hits", "all"),
            [
                [name, str(_hits(run)), str(sum(run["cache"].values()))]
                for name, run in runs.items()
            ],
        ),
    ]
    bad = {name: run["statuses"] for name, run in runs.items() if set(run["statuses"]) != {"200"}}
    outcome.check("no errors", str(bad or "none"), not bad)
    bound = _NOISE * runs["Redis works, no hits"]["latency_ms"]["p99"] + _TIMEOUTS_SECONDS * 1e3
    for name in ("Redis paused", "Redis killed"):
        p99 = runs[name]["latency_ms"].get("p99", float("inf"))
        outcome.check(
            f"{name}: p99 <= {_NOISE} times that without hits + the cache's timeouts of 150 ms",
            f"{p99:.0f} ms, {bound:.0f} ms",
            p99 <= bound,
        )
    again = _hits(runs["Redis started again"])
    outcome.check("hits again after the restart", str(again), again > 0)
    return outcome


def x6(bench: Bench) -> Outcome:
    """SIGTERM under load."""
    outcome = Outcome("X6", "SIGTERM in an open loop at 80 % of the knee, just after a burst of 8")
    seconds = bench.seconds(30)
    with bench.service("--drain-seconds", str(_DRAIN_SECONDS)) as server:
        knee, _ = bench.find_knee(server, bench.traffic())
        exits = ExitWatch(server)
        term = Later(seconds / 2, server.terminate)
        offsets = arrivals(rate=0.8 * knee.rate, seconds=seconds, seed=bench.arguments.seed)
        offsets += [seconds / 2 - _BURST_SECONDS] * _BURST  # so that it has something to finish
        load = open_loop(server.target, bench.traffic(), sorted(offsets))
        term.join()
        exits.join(_DRAIN_SECONDS + _EXIT_SECONDS)
        status, ended_at = exits.status, exits.at  # of its own accord, not because of us
    before, after = _around(load, term.at)
    in_flight = [sample for sample in before if sample.ended > term.at]
    lost = [s for s in before if not _is_settled(s, term.at)]
    lost += [s for s in after if s.failure in ("cut off", "timeout")]
    took = ended_at - term.at if status is not None else float("inf")
    outcome.figures = {
        "knee": knee._asdict(),
        "before": _counts(before),
        "in_flight": _counts(in_flight),
        "after": _counts(after),
        "lost": [outcome_of(sample) for sample in lost],
        "seconds_to_exit": took,
        "exit_status": status,
    }
    outcome.tables = [
        Table(
            f"requests by when they were sent, at 80 % of {knee.rate:.1f}/s",
            ("", "answers"),
            [
                ["before SIGTERM", str(_counts(before))],
                ["of these, in flight at SIGTERM", str(_counts(in_flight))],
                ["after SIGTERM", str(_counts(after))],
            ],
        )
    ]
    outcome.check("no admitted request is lost", f"{len(lost)} lost", not lost)
    outcome.check("requests were in flight", str(len(in_flight)), len(in_flight) > 0 or None)
    outcome.check(
        f"it ends by itself within the drain deadline of {_DRAIN_SECONDS} s, with status 0",
        f"status {status} after {took:.1f} s",
        status == 0 and took <= _DRAIN_SECONDS,
    )
    return outcome


def x8(bench: Bench) -> Outcome:
    """A device that is lost."""
    outcome = Outcome("X8", "a CUDA error, planted, under a closed loop")
    seconds = bench.seconds(10)
    with tempfile.TemporaryDirectory() as folder:
        trigger = Path(folder) / "fatal"
        flags = ("--fatal-when", str(trigger))
        with (
            bench.service(*flags, module="benchmarks.serving.fatal_encoder") as server,
            watching(server.url, server.pid) as watch,
        ):
            exits = ExitWatch(server)
            fatal = Later(seconds / 2, trigger.touch)
            load = closed_loop(server.target, bench.traffic(), clients=16, seconds=seconds)
            fatal.join()
            exits.join(_EXIT_SECONDS)
            status, ended_at = exits.status, exits.at  # of its own accord, not because of us
    before, _ = _around(load, fatal.at)
    in_flight = [sample for sample in before if sample.ended > fatal.at]
    failed = [p.asked + p.seconds for p in watch.probes if p.status != 200 and p.asked > fatal.at]
    took = min(failed, default=float("inf")) - fatal.at
    exit_took = ended_at - fatal.at if status is not None else float("inf")
    outcome.figures = {
        "in_flight": _counts(in_flight),
        "seconds_to_livez": took,
        "seconds_to_exit": exit_took,
        "exit_status": status,
        "livez": livez(watch),
    }
    outcome.tables = [livez_table([("all of it", outcome.figures["livez"])])]
    outcome.check(f"/livez fails in < {_LIVEZ_SECONDS} s", f"{took:.2f} s", took < _LIVEZ_SECONDS)
    outcome.check(
        "the process ends with a status that is not 0",
        f"status {status} after {exit_took:.2f} s",
        status not in (None, 0),
    )
    # One batch was on its way through the model when the file appeared.
    wrong = [sample for sample in in_flight if sample.status not in (200, 503)]
    refused = sum(sample.status == 503 for sample in in_flight)
    outcome.check(
        "requests in flight get 503",
        str(_counts(in_flight)),
        not wrong and refused > 0,
    )
    return outcome


def _around(load: Load, moment: float) -> tuple[list[Sample], list[Sample]]:
    """Requests sent before a moment, and those sent after it."""
    before = [sample for sample in load.samples if sample.sent < moment]
    return before, [sample for sample in load.samples if sample.sent >= moment]


def _is_settled(sample: Sample, signalled: float) -> bool:
    """Answered, or refused in time; a 503 is fair only if the server had not begun."""
    if sample.status in (200, 429):
        return True
    is_unsure = signalled - sample.sent < _UNSURE_SECONDS
    return is_unsure and (sample.status == 503 or sample.failure == "closed")


def _counts(samples: list[Sample]) -> dict[str, int]:
    return dict(Counter(outcome_of(sample) for sample in samples))


def _hits(figures: Figures) -> int:
    hits: int = figures["cache"].get("hit", 0)
    return hits
