"""Closed loops: how much the service can do, and how much of that the bare model could.

rounds  served, bare and pipelined in turn, at one concurrency
C1      throughput and latency over concurrency, the knee, and rounds at the knee
C2      the same with mixed sizes and aspects
"""

import statistics
import struct
import time
from collections.abc import Callable, Sequence
from itertools import islice

import orjson

from benchmarks.load import Load, closed_loop
from benchmarks.serving.bare import bare, pipelined
from benchmarks.serving.bench import Bench
from benchmarks.serving.measure import (
    KNEE_SHARE,
    Figures,
    Knee,
    alternate,
    livez,
    median_ratio,
    memory_figures,
    metric,
    percentiles,
    summary,
)
from benchmarks.serving.outcome import Outcome, Table, counts, livez_table, load_table, stage_table
from benchmarks.serving.processes import CoreShare, ServerProcess, post
from benchmarks.serving.watch import watching

_C1_LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_C1_RATIO = 0.85


class ServedRounds:
    """Rounds of the service, and of the loops that it is held against."""

    def __init__(self, bench: Bench, server: ServerProcess, clients: int) -> None:
        self._bench = bench
        self._server = server
        self._clients = clients
        self._traffic = bench.traffic()
        self._bodies: list[bytes] = []
        self.loads: list[Load] = []
        self.batches: list[float] = []

    def served(self) -> float:
        """Images/s of a round of the service; every image is sent once."""
        jobs = list(islice(self._traffic, self._bench.arguments.num_images))
        before = self._batch_counts()
        load = closed_loop(self._server.target, jobs, clients=self._clients)
        images, batches = (b - a for a, b in zip(before, self._batch_counts(), strict=True))
        if len(load.answered) < len(jobs):
            raise SystemExit(f"not every request was answered: {summary(load)['statuses']}")
        self._bodies = [job.body for job in jobs]
        self.batches.append(images / batches)
        self.loads.append(load)
        return load.rate

    def bare(self) -> float:
        """Images/s of the same images in the same batches, in this process."""
        return self._loop(bare)

    def pipelined(self) -> float:
        """The same with decoding in threads."""
        return self._loop(pipelined)

    def run(self, more: dict[str, Callable[[], float]] | None = None) -> Figures:
        """Rounds of all, in turn, and what came of them."""
        bare(self._bench.encoder, self._bench.images[:16], self._bench.size, 8)
        closed_loop(
            self._server.target, islice(self._traffic, 2 * self._clients), clients=self._clients
        )
        cores = CoreShare()
        contenders = {"served": self.served, "bare": self.bare, "pipelined": self.pipelined}
        rates = alternate(contenders | (more or {}), self._bench.num_rounds)
        latencies = [sample.latency for load in self.loads for sample in load.answered]
        return {
            "clients": self._clients,
            "images": self._bench.arguments.num_images,
            "rounds": rates,
            "images_per_second": {name: statistics.median(all_) for name, all_ in rates.items()},
            "served_over": {
                name: median_ratio(rates, "served", name) for name in rates if name != "served"
            },
            "mean_batch": statistics.mean(self.batches),
            "latency_ms": percentiles(latencies),
            "stage_ms": summary(self.loads[-1])["stage_ms"],
            "response_bytes": summary(self.loads[-1])["response_bytes"],
            "cores_taken_by_others": cores.others(),
        }

    def _loop(self, loop: Callable[..., None]) -> float:
        started = time.perf_counter()
        batch = max(1, round(self.batches[-1]))
        loop(self._bench.encoder, self._bodies, self._bench.size, batch)
        return len(self._bodies) / (time.perf_counter() - started)

    def _batch_counts(self) -> tuple[float, float]:
        url = self._server.url
        return metric(url, "refinery_batch_images_sum"), metric(url, "refinery_batch_images_count")


def rounds(bench: Bench) -> Outcome:
    """Served, bare and pipelined in turn, at `--clients`."""
    outcome = Outcome("rounds", "served, bare and pipelined in turn, closed loop")
    with bench.service() as server:
        outcome.figures = ServedRounds(bench, server, bench.arguments.clients).run()
    outcome.tables = [
        rounds_table(outcome.figures),
        stage_table("stages, ms", [("", outcome.figures)]),
    ]
    return outcome


def c1(bench: Bench) -> Outcome:
    """Closed loop over concurrencies, one size, nothing cached."""
    outcome = Outcome("C1", "closed loop over concurrency, one size, every image new")
    levels = bench.arguments.concurrency or _C1_LEVELS
    with bench.service() as server:
        with watching(server.url, server.pid) as watch:
            knee, points = bench.find_knee(
                server, bench.traffic(), seconds=bench.seconds(60), levels=levels
            )
        at_knee = ServedRounds(bench, server, knee.concurrency).run()
    outcome.figures = {
        "curve": points,
        "knee": knee._asdict(),
        "at_knee": at_knee,
        "livez": livez(watch),
        "memory": memory_figures(watch.memory),
    }
    outcome.tables = [
        curve_table(points, knee),
        stage_table("stages, mean ms", [(str(p["concurrency"]), p) for p in points]),
        rounds_table(at_knee),
        livez_table([("all of the sweep", outcome.figures["livez"])]),
    ]
    ratio = at_knee["served_over"]["bare"]
    outcome.check(f"served / bare >= {_C1_RATIO} at the knee", f"{ratio:.3f}", ratio >= _C1_RATIO)
    return outcome


def c2(bench: Bench) -> Outcome:
    """Closed loop with mixed sizes and aspects."""
    outcome = Outcome("C2", "closed loop, mixed sizes and aspects 1:2 to 2:1, every image new")
    with bench.service() as server:
        in_buckets = bucket_waste(bench, server)
        before = _batch_metrics(server)
        knee, points = bench.find_knee(server, bench.mixed_traffic(), seconds=bench.seconds(60))
        images, batches, tokens, padding = (
            b - a for a, b in zip(before, _batch_metrics(server), strict=True)
        )
    at_knee = next(point for point in points if point["concurrency"] == knee.concurrency)
    in_batches = padding / (tokens + padding)
    outcome.figures = {
        "curve": points,
        "knee": knee._asdict(),
        "padding_waste_in_buckets": in_buckets,
        "padding_waste_in_batches": in_batches,
        "mean_batch": images / batches,
    }
    outcome.tables = [
        curve_table(points, knee),
        Table(
            f"by longest side, at the knee, ms; mean batch {images / batches:.1f}",
            ("", "requests", "p50", "p99", "answers"),
            [
                [
                    kind,
                    str(each["requests"]),
                    *(f"{each['latency_ms'].get(key, 0):.0f}" for key in ("p50", "p99")),
                    counts(each["statuses"]),
                ]
                for kind, each in at_knee["by_kind"].items()
            ],
        ),
        Table(
            "padding, of the tokens encoded",
            ("by buckets", "by recorded batches"),
            [[f"{in_buckets:.1%}", f"{in_batches:.1%}"]],
        ),
    ]
    answered = all(set(point["statuses"]) == {"200"} for point in points)
    outcome.check("every size is answered", "all 200" if answered else "see the table", answered)
    return outcome


def _batch_metrics(server: ServerProcess) -> tuple[float, ...]:
    names = ("batch_images_sum", "batch_images_count", "batch_tokens_sum", "padding_tokens_total")
    return tuple(metric(server.url, f"refinery_{name}") for name in names)


def bucket_waste(bench: Bench, server: ServerProcess) -> float:
    """Share of patches that are encoded for nothing, by what answers to the mix say of buckets."""
    wanted = spent = 0
    for job in islice(bench.mixed_traffic(), 40):
        answer = post(f"{server.url}/features{job.query}", job.body)
        (length,) = struct.unpack("<Q", answer[:8])
        metadata = orjson.loads(answer[8 : 8 + length])["__metadata__"]
        (image,) = orjson.loads(metadata["images"])
        height, width = image["resized_to"]
        bucket = [int(side) for side in image.get("bucket", f"{height}x{width}").split("x")]
        wanted += height * width
        spent += bucket[0] * bucket[1]
    return 1 - wanted / spent


def curve_table(points: Sequence[Figures], knee: Knee) -> Table:
    """Throughput and latency over concurrency; the knee is marked."""
    rows = [
        (f"{p['concurrency']}" + (" (knee)" if p["concurrency"] == knee.concurrency else ""), p)
        for p in points
    ]
    title = f"closed loop by concurrency; knee: the first with {KNEE_SHARE:.0%} of the best"
    return load_table(title, rows)


def rounds_table(figures: Figures) -> Table:
    """Medians of the rounds, and the ratios within a round."""
    rates, ratios = figures["images_per_second"], figures["served_over"]
    rows = [
        [name, f"{rate:.1f}", " ".join(f"{value:.1f}" for value in figures["rounds"][name]),
         f"{ratios[name]:.3f}" if name in ratios else "1"]
        for name, rate in rates.items()
    ]  # fmt: skip
    title = (
        f"{figures['images']} images a round, {figures['clients']} clients, mean batch "
        f"{figures['mean_batch']:.1f}, other programs took {figures['cores_taken_by_others']:.2f} "
        "cores"
    )
    return Table(title, ("", "images/s, median", "rounds", "served / it, median of rounds"), rows)
