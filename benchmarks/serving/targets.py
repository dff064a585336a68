"""The figures that the project promises, each against its criterion, in one run.

targets  knee, served against bare, pipelined and peers, latency, cache hits, /livez under load
peers    only served against bare and the peers
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import NamedTuple

from benchmarks.load import arrivals, closed_loop, open_loop
from benchmarks.serving.bare import check_peer
from benchmarks.serving.bench import Bench
from benchmarks.serving.capacity import ServedRounds, curve_table, rounds_table
from benchmarks.serving.measure import (
    Figures,
    livez,
    memory_figures,
    open_summary,
    queue_p99_ms,
    summary,
    sweep,
)
from benchmarks.serving.outcome import Outcome, livez_table, load_table, stage_table
from benchmarks.serving.processes import ServerProcess, peer
from benchmarks.serving.watch import watching

PEERS = ("fastapi", "litserve")
_PEER_LEVELS = (1, 2, 4, 8, 16, 32)
_LATENCY_RATIO = 3.0
_LIVEZ_MS = 20.0
_SHARE = 0.8  # of the knee's rate
_FASTAPI_RATIO, _LITSERVE_RATIO = 1.5, 1.0
_IDLE_SECONDS = 5.0
_HIT_CLIENTS = 8  # or the knee, if that is more


class Criteria(NamedTuple):
    """What depends on how heavy the model is."""

    served_over_bare: float
    hits_over_misses: float


def criteria(bench: Bench) -> Criteria:
    """The promises for this model, size and device."""
    model = bench.info["model"]
    if any("cuda" in device for device in model["devices"]):
        return Criteria(0.95, 100.0)
    is_heavy = model["embed_dim"] >= 384 and min(bench.size) >= 512
    return Criteria(0.97, 100.0) if is_heavy else Criteria(0.88, 10.0)


def targets(bench: Bench) -> Outcome:
    """Everything that the project promises of its speed."""
    outcome = Outcome("targets", "the promises, each with its criterion, in one run")
    seconds = bench.seconds(30)
    wanted = criteria(bench)
    with bench.service() as server:
        knee, points = bench.find_knee(server, bench.traffic(), seconds=seconds)
        _compare(bench, server, knee.concurrency, outcome)
        offsets = arrivals(rate=_SHARE * knee.rate, seconds=2 * seconds, seed=bench.arguments.seed)
        with watching(server.url, server.pid) as at_share_watch:
            load = open_loop(server.target, bench.traffic(), offsets)
        at_share = open_summary(load, offsets)
        with watching(server.url, server.pid) as full_watch:
            full = closed_loop(
                server.target, bench.traffic(), clients=2 * knee.concurrency, seconds=seconds
            )
        hits_clients = max(knee.concurrency, _HIT_CLIENTS)
        hits = _hits(bench, server, hits_clients, seconds)
        with watching(server.url, server.pid) as idle_watch:
            time.sleep(bench.short(_IDLE_SECONDS))
    single = points[0] if points[0]["concurrency"] == 1 else None
    probes = {
        "idle": livez(idle_watch),
        "at 80 % of the knee": livez(at_share_watch),
        "full load": livez(full_watch),
    }
    outcome.figures |= {
        "curve": points,
        "knee": knee._asdict(),
        "at_80_percent": at_share,
        "full_load": summary(full),
        "hits": hits,
        "livez": probes,
        "memory": memory_figures(full_watch.memory),
    }
    outcome.tables = [
        curve_table(points, knee),
        *outcome.tables,
        load_table(
            "open loop at 80 % of the knee, full load, cache hits alone",
            [
                (f"Poisson, {at_share['offered']:.1f}/s offered", at_share),
                (f"{2 * knee.concurrency} clients, misses", outcome.figures["full_load"]),
                (f"{hits_clients} clients, hits", hits),
            ],
        ),
        stage_table("stages, mean ms", [("80 %", at_share), ("hits", hits)]),
        livez_table(list(probes.items())),
    ]
    at_knee = outcome.figures["at_knee"]
    served = at_knee["served_over"]["bare"]
    outcome.check(
        f"served / bare >= {wanted.served_over_bare} at the knee",
        f"{served:.3f}",
        served >= wanted.served_over_bare,
    )
    _check_peers(outcome, at_knee)
    ideal = queue_p99_ms(offsets, rate=at_knee["images_per_second"]["bare"])
    outcome.figures["p99_of_an_ideal_queue_ms"] = ideal
    _check_latency(outcome, at_share, single, ideal)
    ratio = hits["rate"] / knee.rate
    is_cached = hits["cache"].get("hit", 0) == sum(hits["cache"].values())
    outcome.check(
        f"hits / misses >= {wanted.hits_over_misses:g}, images/s",
        f"{ratio:.1f}" + ("" if is_cached else f"; not all were hits: {hits['cache']}"),
        ratio >= wanted.hits_over_misses and is_cached,
    )
    p99 = probes["full load"]["latency_ms"]["p99"]
    idle = probes["idle"]["latency_ms"]["p99"]
    outcome.check(
        f"/livez p99 < {_LIVEZ_MS:g} ms under full load",
        f"{p99:.1f} ms, {p99 / idle:.1f} times the idle p99",
        p99 < _LIVEZ_MS and not probes["full load"]["failed"],
    )
    return outcome


def peers(bench: Bench) -> Outcome:
    """Served against bare and the peers at the knee."""
    outcome = Outcome("peers", "the same work by other servers, in turn")
    with bench.service() as server:
        knee, points = bench.find_knee(server, bench.traffic())
        outcome.figures = {"curve": points, "knee": knee._asdict()}
        _compare(bench, server, knee.concurrency, outcome)
    _check_peers(outcome, outcome.figures["at_knee"])
    return outcome


@contextmanager
def _paused_peers(bench: Bench) -> Iterator[dict[str, ServerProcess]]:
    """The peers, ready and stopped where they stand; whoever is measured is resumed."""
    with ExitStack() as stack:
        servers = {}
        for name in PEERS:
            server = stack.enter_context(
                peer(name, bench.model, precision=bench.precision, size=bench.size)
            )
            check_peer(
                server.url, bench.encoder, bench.images, bench.size, tolerance=bench.tolerance
            )
            server.pause()
            servers[name] = server
        yield servers


def _compare(bench: Bench, server: ServerProcess, clients: int, outcome: Outcome) -> None:
    """Rounds of the service, the loops and the peers.

    Each peer gets the same clients as the service, and as many as suit it best.
    """
    with _paused_peers(bench) as servers:
        curves = {}
        levels = [level for level in _PEER_LEVELS if level <= max(bench.levels)]
        for name, other in servers.items():
            with _resumed(other):
                curves[name] = sweep(other.target, bench.traffic(), levels, bench.short(10))
        best = {
            name: max(points, key=lambda point: point["rate"])["concurrency"]
            for name, points in curves.items()
        }
        contenders = {}
        for name, other in servers.items():
            contenders[name] = _peer_round(bench, other, clients)
            if best[name] != clients:
                contenders[at_best(name)] = _peer_round(bench, other, best[name])
        at_knee = ServedRounds(bench, server, clients).run(contenders)
    outcome.figures |= {"at_knee": at_knee, "peer_curves": curves, "peer_concurrency": best}
    outcome.tables += [
        rounds_table(at_knee),
        *(
            load_table(
                f"{name}, closed loop by concurrency; best: {best[name]}",
                [(str(point["concurrency"]), point) for point in points],
            )
            for name, points in curves.items()
        ),
    ]


def _peer_round(bench: Bench, server: ServerProcess, clients: int) -> Callable[[], float]:
    traffic = bench.traffic()

    def round_() -> float:
        jobs = list(islice(traffic, bench.arguments.num_images))
        with _resumed(server):
            load = closed_loop(server.target, jobs, clients=clients)
        if len(load.answered) < len(jobs):
            raise SystemExit(f"{server.name} failed: {summary(load)['statuses']}")
        return load.rate

    return round_


@contextmanager
def _resumed(server: ServerProcess) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()


def _hits(bench: Bench, server: ServerProcess, clients: int, seconds: float) -> Figures:
    traffic = bench.traffic(hit_rate=1.0)
    closed_loop(server.target, traffic.warm_up, clients=4)
    return summary(closed_loop(server.target, traffic, clients=clients, seconds=seconds))


def at_best(name: str) -> str:
    """How rounds of a peer at its own best concurrency are called."""
    return f"{name} at its best"


def _check_peers(outcome: Outcome, at_knee: Figures) -> None:
    ratios = at_knee["served_over"]
    for name, least in (("fastapi", _FASTAPI_RATIO), ("litserve", _LITSERVE_RATIO)):
        for contender in (name, at_best(name)):
            if contender in ratios:
                ratio = ratios[contender]
                outcome.check(f"served / {contender} >= {least:g}", f"{ratio:.2f}", ratio >= least)


def _check_latency(
    outcome: Outcome, at_share: Figures, single: Figures | None, ideal: float
) -> None:
    criterion = f"p99 at 80 % of the knee <= {_LATENCY_RATIO:g} times the single-request latency"
    if single is None:
        outcome.check(criterion, "the sweep has no concurrency of 1", None)
        return
    if at_share["is_void"]:
        outcome.check(criterion, "void: the generator missed its rate", None)
        return
    p99, alone = at_share["latency_ms"]["p99"], single["latency_ms"]["p50"]
    outcome.check(
        criterion,
        f"{p99:.0f} ms / {alone:.0f} ms = {p99 / alone:.2f}; one image at a time at the bare "
        f"model's rate would have given {ideal:.0f} ms",
        p99 <= _LATENCY_RATIO * alone,
    )
