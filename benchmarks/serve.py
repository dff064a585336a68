"""Served images per second against the bare model, on the same images, in one run.

    python -m benchmarks.serve --model models/demo --images DIR

A server process answers a closed loop of clients; every image is sent once per round. Then the
same images go through an in-process loop that decodes, resizes and encodes them in batches of the
size that the server formed on average: `bare`. `pipelined` is the same loop with the next batch
decoded in threads while one is encoded: what the machine could do without any HTTP. Rounds of the
three alternate, so that a busy machine disturbs all alike. Before anything is timed, served
features are compared with those of the bare model.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import torch
from safetensors.numpy import load
from torch import Tensor

from backbone import Backbone, DenseEncoder, RegisterBorder, open_model, save_artifact
from backbone.preprocess import decode_image, resize_image
from benchmarks.load import LoadResult, closed_loop
from benchmarks.report import machine, to_markdown, versions

Variant = Literal["served", "bare", "pipelined"]

_SUFFIXES = (".jpg", ".jpeg")
_START_SECONDS = 120
_ANSWER_SECONDS = 30


def main() -> None:
    arguments = parse_arguments()
    if "OMP_WAIT_POLICY" not in os.environ:
        # As the service does; torch reads it once, when it is loaded, which has happened here.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.serve", *sys.argv[1:]])
    bodies = read_images(arguments.images, arguments.num_images)
    with artifact(arguments) as model, server(arguments, model) as url:
        info = json.loads(get(url + "/info"))
        size = (arguments.size,) * 2 if arguments.size else tuple(info["model"]["native_size"])
        target = f"{url}/features?size={size[0]},{size[1]}"
        encoder = open_model(model, precision=info["model"]["precision"])
        difference = parity(target, encoder, bodies[:4], size)
        if difference > info["tolerance"]["max_relative_error"]:
            raise SystemExit(f"served and bare features differ by {difference:.2g}: not compared")
        result = measure(arguments, url, target, encoder, bodies, size)
    result = {
        "command": "python -m benchmarks.serve " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "model": info["model"],
        "size": size,
        "clients": arguments.clients,
        "images": len(bodies),
        "largest_relative_difference": difference,
    } | result
    text = json.dumps(result, indent=2)
    markdown = to_markdown(result)
    sys.stdout.write(markdown + "\n")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown + "\n")


def measure(
    arguments: argparse.Namespace,
    url: str,
    target: str,
    encoder: DenseEncoder,
    bodies: Sequence[bytes],
    size: tuple[int, int],
) -> dict[str, Any]:
    """Rounds of the three variants, one after the other."""
    closed_loop(target, bodies[: 4 * arguments.clients], clients=arguments.clients)
    bare(encoder, bodies[:16], size, 8)
    rates: dict[Variant, list[float]] = {"served": [], "bare": [], "pipelined": []}
    loads: list[LoadResult] = []
    batch_sizes = []
    started_all, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    for number in range(arguments.rounds):
        images, batches = batch_counts(url)
        loads.append(closed_loop(target, bodies, clients=arguments.clients))
        more_images, more_batches = batch_counts(url)
        if loads[-1].statuses != {200: len(bodies)}:
            raise SystemExit(f"not every request was answered: {loads[-1].statuses}")
        mean_batch = (more_images - images) / (more_batches - batches)
        batch = max(1, round(mean_batch))
        batch_sizes.append(mean_batch)
        rates["served"].append(loads[-1].requests_per_second)
        for variant, loop in (("bare", bare), ("pipelined", pipelined)):
            started = time.perf_counter()
            loop(encoder, bodies, size, batch)
            seconds = time.perf_counter() - started
            rates[variant].append(len(bodies) / seconds)  # type: ignore[index]
        line = ", ".join(f"{name} {values[-1]:.1f}/s" for name, values in rates.items())
        sys.stderr.write(f"round {number + 1} of {arguments.rounds}: {line}\n")
    others = (busy_seconds() - busy) - (own_seconds() - own)
    latencies = [latency for load in loads for latency in load.latencies]
    stages = loads[0].stage_milliseconds
    return {
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "served_over_bare": statistics.median(
            one / other for one, other in zip(rates["served"], rates["bare"], strict=True)
        ),
        "served_over_pipelined": statistics.median(
            one / other for one, other in zip(rates["served"], rates["pipelined"], strict=True)
        ),
        "cores_taken_by_others": others / (time.perf_counter() - started_all),
        "mean_batch": statistics.mean(batch_sizes),
        "latency_ms": {
            f"p{percent}": float(np.percentile(latencies, percent)) * 1e3
            for percent in (50, 90, 99)
        },
        "stage_ms": {
            stage: statistics.mean(
                value for load in loads for value in load.stage_milliseconds[stage]
            )
            for stage in stages
        },
        "response_bytes": loads[0].received_bytes // len(bodies),
    }


def bare(encoder: DenseEncoder, bodies: Sequence[bytes], size: tuple[int, int], batch: int) -> None:
    """Decode, resize and encode, batch after batch, in this thread."""
    for chunk in chunks(bodies, batch):
        encode(encoder, [decode(body, size) for body in chunk])


def pipelined(
    encoder: DenseEncoder, bodies: Sequence[bytes], size: tuple[int, int], batch: int
) -> None:
    """The same with the images of the next batches decoded in threads meanwhile."""
    with ThreadPoolExecutor(initializer=lambda: torch.set_num_threads(1)) as threads:
        waiting: list[list[Future[Tensor]]] = []
        for chunk in chunks(bodies, batch):
            waiting.append([threads.submit(decode, body, size) for body in chunk])
            if len(waiting) > 2:
                encode(encoder, [future.result() for future in waiting.pop(0)])
        for futures in waiting:
            encode(encoder, [future.result() for future in futures])


def decode(body: bytes, size: tuple[int, int]) -> Tensor:
    return resize_image(decode_image(body), size)


def encode(encoder: DenseEncoder, images: Sequence[Tensor]) -> Tensor:
    return encoder.encode(torch.stack(list(images)))[0].tokens.cpu()


def chunks(bodies: Sequence[bytes], batch: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(bodies), batch):
        yield bodies[start : start + batch]


def parity(
    target: str, encoder: DenseEncoder, bodies: Sequence[bytes], size: tuple[int, int]
) -> float:
    """Largest relative error of a served token against the bare model's."""
    worst = 0.0
    for body in bodies:
        request = Request(
            target + "&dtype=float32&layout=tokens", body, {"content-type": "image/jpeg"}
        )
        with urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            served_NC = torch.from_numpy(load(answer.read())["features.0"])
        bare_NC = encode(encoder, [decode(body, size)])[0].float()
        error_N = (served_NC - bare_NC).norm(dim=-1) / bare_NC.norm(dim=-1)
        worst = max(worst, float(error_N.max()))
    return worst


@contextmanager
def artifact(arguments: argparse.Namespace) -> Iterator[str]:
    """What both sides open; random weights are drawn once and written down for both."""
    if not arguments.random_weights:
        yield arguments.model
        return
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone.load(arguments.model, random_weights=True)
        path = Path(folder) / "random"
        save_artifact(path, backbone, border=RegisterBorder(), model_card="random weights\n")
        yield str(path)


@contextmanager
def server(arguments: argparse.Namespace, model: str) -> Iterator[str]:
    """The service as a process of its own; its URL once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "--model", model, "--port", str(port)]
    command += ["--precision", arguments.precision, "--log-level", "warning"]
    process = subprocess.Popen([*command, *arguments.service])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url, process))
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"the service was not ready after {_START_SECONDS} s")
        time.sleep(0.1)


def is_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"the service ended with status {process.returncode}")
    try:
        return bool(get(url + "/readyz"))
    except (URLError, TimeoutError):
        return False


def get(url: str) -> str:
    with urlopen(url, timeout=_ANSWER_SECONDS) as answer:
        content: bytes = answer.read()
        return content.decode()


def busy_seconds() -> float:
    """Seconds that the cores of this machine have worked so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def own_seconds() -> float:
    """Seconds that this process and the server have worked so far."""
    process = psutil.Process()
    return float(sum(sum(each.cpu_times()[:2]) for each in (process, *process.children())))


def batch_counts(url: str) -> tuple[float, float]:
    """Images and batches that the server has encoded so far."""
    text = get(url + "/metrics")
    found = [
        re.search(rf"^refinery_batch_images_{name} ([\d.e+]+)$", text, re.MULTILINE)
        for name in ("sum", "count")
    ]
    assert found[0]
    assert found[1]
    return float(found[0][1]), float(found[1][1])


def read_images(folder: Path, num_images: int) -> list[bytes]:
    """Bytes of different JPEG files, the same ones each time."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(files) < num_images:
        raise SystemExit(f"{folder} has {len(files)} JPEG files; --num-images is {num_images}")
    step = len(files) // num_images  # from the whole folder, not its first source alone
    return [path.read_bytes() for path in files[::step][:num_images]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Served images/s over the bare model's, closed loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="as for python -m service")
    parser.add_argument("--random-weights", action="store_true", help="random weights and a border")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--num-images", type=int, default=400, help="images of a round")
    parser.add_argument("--size", type=int, help="side in pixels; default the model's own size")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each variant")
    parser.add_argument("--precision", default="auto", help="as for python -m service")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--markdown", type=Path, help="file for the result as a table")
    parser.add_argument(
        "--service", nargs=argparse.REMAINDER, default=[], help="more flags of the service, last"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
