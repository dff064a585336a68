"""A tiny HTTP server that answers as a test tells it to."""

import contextlib
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from benchmarks.load import Target

_LENGTH = re.compile(rb"content-length: (\d+)")


class Request(NamedTuple):
    head: str
    body: bytes


# Seconds to wait, and the whole answer; None closes the connection without one.
Answer = Callable[[Request], tuple[float, bytes | None]]


class FakeServer(socketserver.ThreadingTCPServer):
    """Notes what it is sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[Request] = []
        self.num_connections = 0
        self.cuts_off = False  # close the connection after an answer

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def target(self) -> Target:
        return Target("127.0.0.1", self.port, "/features")


class _Handler(socketserver.StreamRequestHandler):
    server: FakeServer

    def handle(self) -> None:
        self.server.num_connections += 1
        with contextlib.suppress(OSError):
            while head := b"".join(iter(self._line, b"")):
                found = _LENGTH.search(head.lower())
                body = self.rfile.read(int(found[1])) if found else b""
                self.server.requests.append(Request(head.decode(), body))
                seconds, answer = self.server.answer(self.server.requests[-1])
                time.sleep(seconds)
                if answer is None:
                    break
                self.wfile.write(answer)
                if self.server.cuts_off:
                    break

    def _line(self) -> bytes:
        """The next line of a request's head; empty at its end."""
        line = self.rfile.readline()
        return b"" if line == b"\r\n" else line


@contextmanager
def fake_server(answer: Answer) -> Iterator[FakeServer]:
    """A running server in a thread of its own."""
    with FakeServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def good(body: bytes = b"features", *, status: str = "200 OK", headers: str = "") -> bytes:
    """An answer as the service gives it."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
