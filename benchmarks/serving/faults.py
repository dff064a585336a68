"""Clients that misbehave: what do the others notice?

X2  3 of 10 requests hang up while they wait
X3  damaged, hostile and odd images among good ones
X4  500 times the same image at once
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Iterator

from benchmarks.load import (
    Client,
    Job,
    Load,
    Sample,
    Target,
    arrivals,
    closed_loop,
    open_loop_async,
    run,
)
from benchmarks.serving.bench import Bench
from benchmarks.serving.images import bomb, corrupt, kinds_of, with_comment
from benchmarks.serving.measure import (
    flatness,
    livez,
    memory_figures,
    metric,
    summary,
)
from benchmarks.serving.outcome import Outcome, Table, livez_table, load_table
from benchmarks.serving.processes import ServerProcess, wait_until
from benchmarks.serving.watch import watching

_LEAVERS = 0.3  # of all requests
_UNCHANGED = 0.9
_SETTLE_SECONDS = 15
_EXPECTED_KINDS = {"corrupt": "422", "bomb": "413"}  # all else is to be answered with 200
_SMALL_CACHE = ("--cache-bytes", str(32 * 2**20))  # full soon, so that memory can be flat
_STORM = 500


def x2(bench: Bench) -> Outcome:
    """Requests that hang up in the queue."""
    outcome = Outcome("X2", "closed loop; 30 % of the requests hang up while they wait")
    seconds = bench.seconds(30)
    with bench.service() as server:
        knee, _ = bench.find_knee(server, bench.traffic())
        clients = max(4, knee.concurrency)
        alone: list[Load] = []
        among: list[Load] = []
        left = 0
        for _ in range(2):  # in turn: a busy machine disturbs both alike
            traffic = bench.traffic()
            alone.append(closed_loop(server.target, traffic, clients=clients, seconds=seconds / 2))
            patience = statistics.median(sample.latency for sample in alone[-1].answered)
            load, leavers = run(
                _among_leavers(server.target, bench, clients, seconds / 2, patience)
            )
            among.append(load)
            left += leavers
        gauges = _settled(server)
    rates = [load.rate for load in alone], [load.rate for load in among]
    ratio = statistics.mean(rates[1]) / statistics.mean(rates[0])
    rows = [("alone", summary(alone[-1])), ("among those who leave", summary(among[-1]))]
    outcome.figures = {"rates_alone": rates[0], "rates_among": rates[1], "left": left, **gauges}
    outcome.tables = [load_table(f"{clients} clients that stay; {left} requests left", rows)]
    outcome.check(
        f"images/s of those who stay >= {_UNCHANGED} of before", f"{ratio:.3f}", ratio >= _UNCHANGED
    )
    _check_gauges(outcome, gauges)
    return outcome


async def _among_leavers(
    target: Target, bench: Bench, clients: int, seconds: float, patience: float
) -> tuple[Load, int]:
    client, leaving = Client(target), Client(target)
    traffic = bench.traffic()
    generator = random.Random(bench.arguments.seed)
    started = time.perf_counter()
    deadline = started + seconds
    samples: list[Sample] = []
    leavers: list[asyncio.Task[Sample]] = []
    num_sent = 0

    async def stay() -> None:
        nonlocal num_sent
        while time.perf_counter() < deadline:
            num_sent += 1
            if len(leavers) < num_sent * _LEAVERS / (1 - _LEAVERS):
                waits = generator.uniform(0.1, 0.35) * patience
                job = traffic.fresh()._replace(leaves_after=waits)
                leavers.append(asyncio.create_task(leaving.ask(job)))
            samples.append(await client.ask(traffic.fresh()))

    await asyncio.gather(*(stay() for _ in range(clients)))
    left = sum(sample.failure == "left" for sample in await asyncio.gather(*leavers))
    client.close()
    leaving.close()
    return Load(started, deadline, samples), left


def x3(bench: Bench) -> Outcome:
    """Bad and odd images: 1 % of each kind."""
    outcome = Outcome(
        "X3", "open loop at half the knee, mixed sizes; 1 % each of damaged, hostile and odd files"
    )
    with bench.service(*_SMALL_CACHE) as server:
        knee, _ = bench.find_knee(server, bench.mixed_traffic())
        offsets = arrivals(rate=0.5 * knee.rate, seconds=bench.seconds(120))
        with watching(server.url, server.pid) as watch:
            load = run(open_loop_async(server.target, odd_jobs(bench), offsets))
    figures = summary(load)
    outcome.figures = figures | {
        "memory": memory_figures(watch.memory),
        "livez": livez(watch),
    }
    kinds = figures["by_kind"]
    outcome.tables = [
        Table(
            f"answers by kind of image, at half of {knee.rate:.1f}/s",
            ("", "requests", "answers"),
            [[kind, str(each["requests"]), str(each["statuses"])] for kind, each in kinds.items()],
        ),
        livez_table([("all of it", outcome.figures["livez"])]),
    ]
    wrong = {
        kind: each["statuses"]
        for kind, each in kinds.items()
        if set(each["statuses"]) != {_EXPECTED_KINDS.get(kind, "200")}
    }
    outcome.check("only damaged and hostile images fail, with 422 and 413",
                  str(wrong) if wrong else "so it is", not wrong)  # fmt: skip
    outcome.check(*flatness(watch.memory))
    return outcome


def odd_jobs(bench: Bench) -> Iterator[Job]:
    """Mixed traffic in which one of each odd kind is among every hundred requests."""
    photograph = bench.images[0]
    odd = {
        kind: data
        for kind, data in kinds_of(photograph).items()
        if kind in ("jpeg progressive", "jpeg CMYK", "png 16 bit", "jpeg EXIF-rotated")
    }
    odd |= {"corrupt": corrupt(photograph), "bomb": bomb()}
    generator = random.Random(bench.arguments.seed)
    traffic = bench.mixed_traffic()
    for number in itertools.count():
        places = dict(zip(generator.sample(range(100), len(odd)), odd.items(), strict=True))
        for place in range(100):
            job = traffic.fresh()._replace(kind="photograph")
            if place in places:
                kind, data = places[place]
                media_type = "image/png" if kind in ("bomb", "png 16 bit") else "image/jpeg"
                body = with_comment(data, f"{number}".encode())
                job = job._replace(kind=kind, body=body, content_type=media_type)
            yield job


def x4(bench: Bench) -> Outcome:
    """A storm of one image."""
    outcome = Outcome("X4", f"{_STORM} identical images at once, cold cache")
    with bench.service() as server:
        closed_loop(server.target, bench.traffic(), clients=4, seconds=1)
        before = metric(server.url, "refinery_images_total")
        job = bench.traffic().fresh()
        load = closed_loop(server.target, [job] * _STORM, clients=_STORM)
        forwards = metric(server.url, "refinery_images_total") - before
    figures = summary(load)
    outcome.figures = figures | {"images_encoded": forwards}
    outcome.tables = [load_table("the storm", [(f"{_STORM} clients", figures)])]
    outcome.check("exactly 1 image is encoded", f"{forwards:.0f}", forwards == 1)
    answered = len(load.answered)
    outcome.check("all are answered", f"{answered} of {_STORM}", answered == _STORM)
    return outcome


def _settled(server: ServerProcess) -> dict[str, float]:
    """The gauges of the queue, once they are 0 or some time has passed."""
    names = ("refinery_requests_in_flight", "refinery_queue_images", "refinery_queue_tokens")

    def read() -> dict[str, float]:
        return {name: metric(server.url, name) for name in names}

    try:
        wait_until(lambda: not any(read().values()), "gauges", seconds=_SETTLE_SECONDS)
    except SystemExit:
        return read()
    return read() | {"cancelled": metric(server.url, "refinery_cancelled_images_total")}


def _check_gauges(outcome: Outcome, gauges: dict[str, float]) -> None:
    waiting = {name: value for name, value in gauges.items() if name != "cancelled" and value}
    outcome.check(
        f"gauges return to 0 in {_SETTLE_SECONDS} s", str(waiting or "all 0"), not waiting
    )
    cancelled = gauges.get("cancelled", 0)
    outcome.check(
        "images of those who left are taken out of the queue", f"{cancelled:.0f}", cancelled > 0
    )
