"""An HTTP client for load tests that costs little, because it shares the cores with the server.

    load = closed_loop(target, jobs, clients=16, seconds=30)       # capacity
    load = open_loop(target, jobs, arrivals(rate=20, seconds=30))  # latency at a given rate

In a closed loop each connection sends its next request as soon as it has the answer to the last
one. In an open loop requests are sent when they are due, whatever the server does, and latency
counts from the time that they were due: a server that stalls cannot hide it. Answers are counted
and dropped; nothing looks into tensors. Times are of `time.perf_counter`.
"""

import asyncio
import itertools
import re
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

T = TypeVar("T")

_ANSWER_SECONDS = 120
_PAUSE_SECONDS = 0.05
_BUFFER = memoryview(bytearray(2**18))  # of all connections: what is in it is dropped at once
_HEADER = re.compile(
    rb"^(content-length|server-timing|x-cache|retry-after): *([^\r]*)\r", re.IGNORECASE | re.M
)


class Target(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Target":
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        return cls(parts.hostname, parts.port, parts.path)


class Job(NamedTuple):
    """A request to send."""

    body: bytes
    query: str = ""  # as `?size=512`
    kind: str = ""  # what results are grouped by
    content_type: str = "image/jpeg"
    headers: str = ""  # more of them, each line with its CRLF
    leaves_after: float | None = None  # seconds; the client then hangs up


@dataclass(slots=True)
class Sample:
    """One request and what became of it."""

    kind: str
    due: float
    sent: float = 0.0
    ended: float = 0.0
    status: int = 0  # 0: no answer
    failure: str = ""  # why there is none: refused, closed, cut off, timeout, left
    received_bytes: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def latency(self) -> float:
        """Seconds from when it was due to its last byte."""
        return self.ended - self.due


@dataclass(slots=True)
class Load:
    """A run of requests."""

    started: float
    ended: float  # of the time in which requests were sent
    samples: list[Sample]

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def answered(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.status == 200]

    @property
    def rate(self) -> float:
        """Good answers per second while requests were sent."""
        return sum(sample.ended <= self.ended for sample in self.answered) / self.seconds


class Connection(asyncio.BufferedProtocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._missing = -1  # bytes of the body; -1: the head is not complete
        self._sample: Sample | None = None
        self._done: asyncio.Future[None] | None = None
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        if self._sample is None:
            return
        if self._missing >= 0:
            self._missing -= nbytes
        else:
            self._head += bytes(_BUFFER[:nbytes])
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._head[: end + 2]
            headers = {name.lower(): value for name, value in _HEADER.findall(head)}
            self._sample.headers = headers
            self._sample.status = int(head[9:12])
            length = int(headers.get(b"content-length", 0))
            self._sample.received_bytes = length
            self._missing = length - (len(self._head) - end - 4)
        if self._missing <= 0 and self._done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.is_open = False
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionResetError())

    def hang_up(self) -> None:
        if self._transport:
            self._transport.abort()

    async def ask(self, head: str, job: Job, sample: Sample) -> None:
        """Send a request and fill `sample` with what comes of it."""
        assert self._transport
        self._head, self._missing, self._sample = b"", -1, sample
        self._done = asyncio.get_running_loop().create_future()
        sample.sent = time.perf_counter()
        self._transport.write(head.encode() + job.body)
        try:
            async with asyncio.timeout(job.leaves_after or _ANSWER_SECONDS):
                await self._done
        except ConnectionResetError:
            sample.failure = "cut off" if self._head else "closed"
            sample.status = 0
        except TimeoutError:
            sample.failure = "timeout" if job.leaves_after is None else "left"
            sample.status = 0
            self.hang_up()
        finally:
            sample.ended = time.perf_counter()
            self._sample = None


class Client:
    """Connections to one server, made when they are needed and kept."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[Connection] = []

    async def ask(self, job: Job, due: float | None = None) -> Sample:
        """Send a request over a free connection; `due` is when its latency begins, default now."""
        sample = Sample(job.kind, due if due is not None else time.perf_counter())
        try:
            connection = await self._connection()
        except OSError:
            sample.failure, sample.sent = "refused", time.perf_counter()
            sample.ended = sample.sent
            return sample
        await connection.ask(self._head(job), job, sample)
        if connection.is_open:
            self._idle.append(connection)
        return sample

    async def connect(self, num_connections: int) -> None:
        """Make connections before they are needed."""
        self._idle += [await self._connection() for _ in range(num_connections)]

    def close(self) -> None:
        for connection in self._idle:
            connection.hang_up()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            Connection, self._target.host, self._target.port
        )
        return connection

    def _head(self, job: Job) -> str:
        return (
            f"POST {self._target.path}{job.query} HTTP/1.1\r\n"
            f"host: {self._target.host}:{self._target.port}\r\n"
            f"content-type: {job.content_type}\r\n{job.headers}"
            f"content-length: {len(job.body)}\r\n\r\n"
        )


def closed_loop(
    target: Target, jobs: Iterable[Job], *, clients: int, seconds: float | None = None
) -> Load:
    """Send jobs, `clients` at a time, until there are no more or `seconds` have passed."""
    return run(_closed_loop(target, iter(jobs), clients, seconds))


async def _closed_loop(
    target: Target, jobs: Iterator[Job], clients: int, seconds: float | None
) -> Load:
    client = Client(target)
    await client.connect(clients)
    started = time.perf_counter()
    deadline = started + seconds if seconds is not None else float("inf")
    samples: list[Sample] = []

    async def ask_on() -> None:
        while time.perf_counter() < deadline and (job := next(jobs, None)) is not None:
            samples.append(await client.ask(job))
            if samples[-1].status != 200:
                # Refusals come at once: a client that asks again at once is a busy loop.
                await asyncio.sleep(_PAUSE_SECONDS)

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    client.close()
    return Load(started, min(time.perf_counter(), deadline), samples)


def open_loop(target: Target, jobs: Iterable[Job], offsets: Sequence[float]) -> Load:
    """Send one job at each of `offsets`, in seconds from the start, and wait for the answers."""
    return run(open_loop_async(target, jobs, offsets))


async def open_loop_async(target: Target, jobs: Iterable[Job], offsets: Sequence[float]) -> Load:
    """`open_loop` in a running event loop."""
    client = Client(target)
    started = time.perf_counter()
    tasks = []
    for offset, job in zip(offsets, jobs, strict=False):  # jobs never end
        due = started + offset
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(client.ask(job, due)))
    ended = max(time.perf_counter(), started + offsets[-1])
    samples = await asyncio.gather(*tasks)
    client.close()
    return Load(started, ended, samples)


def arrivals(
    *, rate: float, seconds: float, burstiness: float = 1.0, seed: int = 0, start: float = 0.0
) -> list[float]:
    """When requests are due, in seconds: gamma-distributed gaps with a mean of 1 / `rate`.

    Args:
        burstiness: Shape of the gamma distribution: 1 is a Poisson process, less comes in bursts.
        start: When the first gap begins.
    """
    generator = np.random.default_rng(seed)
    gaps = (generator.gamma(burstiness, 1 / (rate * burstiness)) for _ in itertools.count())
    due = (start + passed for passed in itertools.accumulate(gaps))
    return list(itertools.takewhile(lambda offset: offset < start + seconds, due))


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` in a fast event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
