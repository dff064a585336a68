"""X7: readers that take their large answers slowly, beside clients that do not."""

import asyncio
import math
import socket
import time

from benchmarks.load import Job, Load, Target, arrivals, open_loop_async, run
from benchmarks.serving.bench import Bench
from benchmarks.serving.measure import Figures, livez, memory_figures, summary
from benchmarks.serving.outcome import Outcome, livez_table, load_table
from benchmarks.serving.watch import Watch, watching

_BODY_BYTES = 2_800_000
_BYTES_PER_SECOND = 1_000_000
_READERS = 16
_RECEIVE_BUFFER = 65536
_P99_RATIO, _P99_SLACK_MS = 1.25, 10.0


def x7(bench: Bench) -> Outcome:
    """Slow readers of large answers."""
    model = bench.info["model"]
    patches = bench.size[0] * bench.size[1] // model["patch_size"] ** 2
    layer_bytes = patches * model["embed_dim"] * 4
    num_layers = min(math.ceil(_BODY_BYTES / layer_bytes), bench.info["limits"].get(
        "max_layers", 8), model["num_layers"])  # fmt: skip
    layers = ",".join(str(-number) for number in range(1, num_layers + 1))
    query = f"?size={bench.size[0]},{bench.size[1]}&dtype=float32&layers={layers}"
    body_bytes = num_layers * layer_bytes
    outcome = Outcome(
        "X7",
        f"{_READERS} readers of {body_bytes / 1e6:.1f} MB answers, at 1 MB/s and as fast as "
        "they can; the others in an open loop at half the knee",
    )
    seconds = bench.seconds(60)
    with bench.service() as server:
        knee, _ = bench.find_knee(server, bench.traffic())
        slow_job = bench.traffic().fresh()._replace(query=query)
        runs: dict[str, tuple[Load, int, Watch]] = {}
        for name, pace in (("fast readers", None), ("slow readers", _BYTES_PER_SECOND)):
            offsets = arrivals(rate=0.5 * knee.rate, seconds=seconds, seed=bench.arguments.seed)
            with watching(server.url, server.pid) as watch:
                load, read = run(
                    _beside_readers(server.target, bench, offsets, slow_job, body_bytes, pace)
                )
            runs[name] = load, read, watch
    figures: dict[str, Figures] = {
        name: summary(load)
        | {"bodies_read": read, "livez": livez(watch), "memory": memory_figures(watch.memory)}
        for name, (load, read, watch) in runs.items()
    }
    outcome.figures = dict(figures)
    outcome.tables = [
        load_table("the others", list(figures.items())),
        livez_table([(name, each["livez"]) for name, each in figures.items()]),
    ]
    fast, slow = (figures[name]["latency_ms"]["p99"] for name in ("fast readers", "slow readers"))
    outcome.check(
        f"p99 of the others <= {_P99_RATIO} times that beside fast readers, + {_P99_SLACK_MS:g} ms",
        f"{slow:.0f} ms, {fast:.0f} ms",
        slow <= _P99_RATIO * fast + _P99_SLACK_MS,
    )
    grown = figures["slow readers"]["memory"].get("rss_mib_max", math.inf) - figures[
        "fast readers"
    ]["memory"].get("rss_mib_max", 0)
    allowed = 2 * _READERS * body_bytes / 2**20
    outcome.check(
        f"memory grows by at most 2 answers a reader, {allowed:.0f} MiB",
        f"{grown:.0f} MiB",
        grown <= allowed,
    )
    read = figures["slow readers"]["bodies_read"]
    outcome.check("slow readers get whole answers", f"{read} answers", read > 0)
    return outcome


async def _beside_readers(
    target: Target,
    bench: Bench,
    offsets: list[float],
    job: Job,
    body_bytes: int,
    bytes_per_second: int | None,
) -> tuple[Load, int]:
    """Open-loop traffic beside readers that ask as often, however fast they read."""
    period = body_bytes / _BYTES_PER_SECOND
    until = time.perf_counter() + offsets[-1]
    readers = [
        asyncio.create_task(_read_on(target, job, until, period, bytes_per_second, number))
        for number in range(_READERS)
    ]
    load = await open_loop_async(target, bench.traffic(), offsets)
    return load, sum(await asyncio.gather(*readers))


async def _read_on(
    target: Target,
    job: Job,
    until: float,
    period: float,
    bytes_per_second: int | None,
    number: int,
) -> int:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(number * period / _READERS)
    bodies = 0
    while time.perf_counter() < until:
        started = time.perf_counter()
        with socket.socket() as connection:
            # Small, or the kernel reads fast for the slow reader.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            connection.setblocking(False)
            await loop.sock_connect(connection, (target.host, target.port))
            head = (
                f"POST {target.path}{job.query} HTTP/1.1\r\nhost: {target.host}\r\n"
                f"content-type: {job.content_type}\r\nconnection: close\r\n"
                f"content-length: {len(job.body)}\r\n\r\n"
            )
            await loop.sock_sendall(connection, head.encode() + job.body)
            received, first = 0, b""
            while data := await loop.sock_recv(connection, _RECEIVE_BUFFER):
                first = first or data
                received += len(data)
                if bytes_per_second:
                    due = started + received / bytes_per_second
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
        bodies += first.startswith(b"HTTP/1.1 200") and received > len(first)
        await asyncio.sleep(max(0.0, started + period - time.perf_counter()))
    return bodies
