"""Watches a server while it is under load: how fast `/livez` answers, and what memory it holds.

    with watching(url, pid) as watch:
        ...
    watch.livez_milliseconds(), watch.memory

A process of its own asks 20 times a second, so that neither the load client nor the server's
event loop is what makes a probe late. `lateness` is how much too late the prober itself was woken:
the part of a slow probe that the machine is to blame for. Times are of `time.perf_counter`, which
processes of one machine share.
"""

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

_PROBES_PER_SECOND = 20
_PROBE_SECONDS = 10


class Probe(NamedTuple):
    """One question to `/livez`."""

    asked: float
    seconds: float
    status: int  # 0: no answer
    lateness: float  # s


class Memory(NamedTuple):
    """What the server and its children hold."""

    at: float
    rss_bytes: int
    cpu_seconds: float
    num_threads: int
    num_files: int


@dataclass(slots=True)
class Watch:
    """What was seen; filled when the watching ends."""

    probes: list[Probe] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)


@contextmanager
def watching(url: str, pid: int, *, path: str = "/livez") -> Iterator[Watch]:
    """Watch the server `pid` at `url` until the block ends."""
    watch = Watch()
    command = [sys.executable, "-m", "benchmarks.serving.watch", url + path, str(pid)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield watch
    finally:
        output, _ = process.communicate()  # closes its input: it ends and says what it saw
    seen = json.loads(output)
    watch.probes += [Probe(*values) for values in seen["probes"]]
    watch.memory += [Memory(*values) for values in seen["memory"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    arguments = parser.parse_args()
    ended = threading.Event()
    memory: list[Memory] = []
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    measuring = threading.Thread(target=_measure, args=(arguments.pid, memory, ended))
    measuring.start()
    probes = _probe(arguments.url, ended)
    measuring.join()
    json.dump({"probes": probes, "memory": memory}, sys.stdout)


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _probe(url: str, ended: threading.Event) -> list[Probe]:
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_PROBE_SECONDS)
    probes: list[Probe] = []
    due = time.perf_counter()
    while not ended.wait(max(0.0, due - time.perf_counter())):
        woken = time.perf_counter()
        # A probe that the one before held up counts from when it was due.
        is_held_up = bool(probes) and probes[-1].asked + probes[-1].seconds > due
        asked = due if is_held_up else woken
        status = 0
        try:
            connection.request("GET", parts.path)
            with connection.getresponse() as response:
                response.read()
                status = response.status
        except (OSError, http.client.HTTPException):
            connection.close()
        lateness = 0.0 if is_held_up else woken - due
        probes.append(Probe(asked, time.perf_counter() - asked, status, lateness))
        due += 1 / _PROBES_PER_SECOND
    return probes


def _measure(pid: int, memory: list[Memory], ended: threading.Event) -> None:
    while not ended.wait(1):
        try:
            server = psutil.Process(pid)
            every = [server, *server.children(recursive=True)]
            memory.append(
                Memory(
                    time.perf_counter(),
                    sum(each.memory_info().rss for each in every),
                    sum(sum(each.cpu_times()[:2]) for each in every),
                    sum(each.num_threads() for each in every),
                    sum(each.num_fds() for each in every),
                )
            )
        except psutil.Error:
            continue  # it has ended, or one of its children has; the next look will tell


if __name__ == "__main__":
    main()
