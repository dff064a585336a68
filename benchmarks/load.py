"""A closed-loop HTTP client that costs little, because it shares the cores with the server.

Each connection sends its next request as soon as it has the answer to the last one.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 60
_STAGE = re.compile(r"(\w+);dur=([\d.]+)")


@dataclass(slots=True)
class LoadResult:
    """What a run of requests met."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds
    statuses: dict[int, int] = field(default_factory=dict)
    received_bytes: int = 0
    stage_milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies) / self.seconds


def closed_loop(
    url: str, bodies: Sequence[bytes], *, clients: int, content_type: str = "image/jpeg"
) -> LoadResult:
    """POST every body once, `clients` at a time, over connections that are kept."""
    return asyncio.run(_closed_loop(url, bodies, clients, content_type))


async def _closed_loop(
    url: str, bodies: Sequence[bytes], clients: int, content_type: str
) -> LoadResult:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    head = f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: {content_type}\r\n"
    connections = [
        await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
        for _ in range(clients)
    ]
    result = LoadResult()
    waiting = iter(bodies)  # shared: whoever is free takes the next one
    started = time.perf_counter()
    await asyncio.gather(
        *(_ask(reader, writer, head, waiting, result) for reader, writer in connections)
    )
    result.seconds = time.perf_counter() - started
    for _, writer in connections:
        writer.close()
        await writer.wait_closed()
    return result


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    head: str,
    waiting: Iterator[bytes],
    result: LoadResult,
) -> None:
    for body in waiting:
        started = time.perf_counter()
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            headers = dict(
                line.split(": ", 1) for line in answer.lower().split("\r\n")[1:] if ": " in line
            )
            content = await reader.readexactly(int(headers["content-length"]))
        result.latencies.append(time.perf_counter() - started)
        status = int(answer.split(" ", 2)[1])
        result.statuses[status] = result.statuses.get(status, 0) + 1
        result.received_bytes += len(content)
        for stage, milliseconds in _STAGE.findall(headers.get("server-timing", "")):
            result.stage_milliseconds.setdefault(stage, []).append(float(milliseconds))
