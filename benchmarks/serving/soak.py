"""Ten minutes of all that traffic can be, and memory that stays flat."""

import itertools
import random
from collections.abc import Iterator

from benchmarks.load import Job, arrivals, open_loop
from benchmarks.serving.bench import Bench
from benchmarks.serving.faults import odd_jobs
from benchmarks.serving.measure import flatness, livez, memory_figures, metric, open_summary
from benchmarks.serving.outcome import Outcome, Table, livez_table, load_table, stage_table
from benchmarks.serving.watch import watching

_SECONDS = 600.0
_SHARE = 0.7  # of the knee's rate: some requests leave, some fail, and caches help
_CACHE_BYTES = 32 * 2**20  # full in the first minutes, or its filling would look like a leak
_LEAVE_SHARE, _LEAVE_SECONDS = 0.02, 0.05
_WINDOWS = 10


def soak(bench: Bench) -> Outcome:
    """Everything at once for `--seconds`, 600 by default."""
    outcome = Outcome(
        "soak",
        "open loop, Poisson at 70 % of the knee of misses: mixed sizes, half hits, 1 % each of odd "
        "and bad images, 2 % hang up",
    )
    with bench.service("--cache-bytes", str(_CACHE_BYTES)) as server:
        knee, _ = bench.find_knee(server, bench.mixed_traffic())
        offsets = arrivals(
            rate=_SHARE * knee.rate, seconds=bench.seconds(_SECONDS), seed=bench.arguments.seed
        )
        with watching(server.url, server.pid) as watch:
            load = open_loop(server.target, _jobs(bench), offsets)
        waiting = metric(server.url, "refinery_requests_in_flight")
    figures = open_summary(load, offsets)
    memory = memory_figures(watch.memory)
    outcome.figures = {
        "knee": knee._asdict(),
        "run": figures,
        "livez": livez(watch),
        "memory": memory,
    }
    rows = [("all of it", figures)]
    outcome.tables = [
        load_table(f"{_SHARE:.0%} of {knee.rate:.1f}/s for {load.seconds:.0f} s", rows),
        stage_table("stages, mean ms", rows),
        livez_table([("all of it", outcome.figures["livez"])]),
    ]
    if memory:
        points = memory["rss_mib"]
        step = max(1, len(points) // _WINDOWS)
        shown = points[::step]
        outcome.tables.append(
            Table(
                "resident memory of the server",
                ("s", *(f"{at:.0f}" for at, _ in shown)),
                [["MiB", *(f"{mib:.0f}" for _, mib in shown)]],
            )
        )
    outcome.check(*flatness(watch.memory))
    bad = [sample for sample in load.samples if sample.status >= 500 or sample.failure in
           ("closed", "cut off", "timeout", "refused")]  # fmt: skip
    outcome.check("no 5xx, no request without an answer", f"{len(bad)}", not bad)
    outcome.check("nothing is in flight at the end", f"{waiting:.0f}", waiting == 0)
    outcome.check(
        "/livez never fails",
        f"{outcome.figures['livez']['failed']} of {outcome.figures['livez']['probes']}",
        outcome.figures["livez"]["failed"] == 0,
    )
    return outcome


def _jobs(bench: Bench) -> Iterator[Job]:
    generator = random.Random(bench.arguments.seed)
    hot = list(itertools.islice(odd_jobs(bench), 24))
    for job in odd_jobs(bench):
        chosen = generator.choice(hot) if generator.random() < 0.5 else job
        leaves = generator.random() < _LEAVE_SHARE
        yield chosen._replace(leaves_after=_LEAVE_SECONDS) if leaves else chosen
