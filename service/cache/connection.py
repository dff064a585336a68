"""Connections to Redis that keep to a deadline as a whole, not only from byte to byte.

redis-py starts its timeout anew with each piece that comes, so a server that sends one byte every
now and then would hold a caller for ever.
"""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool
from redis.retry import Retry

from service.cache.address import RedisAddress

_SEND_BYTES = 256 * 1024


class Deadline:
    """When an exchange must be over: `seconds` from now, and later the more bytes have passed.

    A trickle gains nothing; a large answer that flows at `bytes_per_second` or faster is not cut
    off, up to `max_seconds`.
    """

    def __init__(self, seconds: float, *, max_seconds: float, bytes_per_second: float) -> None:
        now = time.monotonic()
        self._end = now + seconds
        self._last_end = now + max_seconds
        self._bytes_per_second = bytes_per_second

    def remaining(self) -> float:
        """Seconds, negative when it is over."""
        return min(self._end, self._last_end) - time.monotonic()

    def progress(self, num_bytes: int) -> None:
        """So many bytes have passed."""
        self._end += num_bytes / self._bytes_per_second


_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def keep(deadline: Deadline) -> Iterator[None]:
    """Hold the commands of this block, together, to `deadline`."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def open_client(
    address: RedisAddress,
    *,
    tls: ssl.SSLContext | None,
    connect_seconds: float,
    read_seconds: float,
    max_connections: int,
) -> redis.Redis:
    """A client that connects with its first command, and does not retry.

    Args:
        tls: How to speak TLS; None: not at all.
        connect_seconds: Longest wait for the connection.
        read_seconds: Longest wait for the next piece of an answer, or for room to send one.
    """
    pool = ConnectionPool(
        connection_class=DeadlineConnection,
        tls=tls,
        host=address.host,
        port=address.port,
        db=address.db,
        username=address.username,
        password=address.password,
        socket_connect_timeout=connect_seconds,
        socket_timeout=read_seconds,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 0),
        protocol=2,  # without the extra exchange that protocol 3 begins with
        max_connections=max_connections,
    )
    return redis.Redis.from_pool(pool)  # which its close() closes too


class DeadlineSocket:
    """The part of a socket that redis-py uses, under the deadline of the running block."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._socket = wrapped
        self._timeout = wrapped.gettimeout()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def recv(self, num_bytes: int) -> bytes:
        self._limit()
        data = self._socket.recv(num_bytes)
        _progress(len(data))
        return data

    def recv_into(self, buffer: bytearray | memoryview, num_bytes: int = 0) -> int:
        self._limit()
        received = self._socket.recv_into(buffer, num_bytes)
        _progress(received)
        return received

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), _SEND_BYTES):
            self._limit()
            piece = view[begin : begin + _SEND_BYTES]
            self._socket.sendall(piece)
            _progress(len(piece))

    def _limit(self) -> None:
        deadline = _deadline.get()
        if deadline is None or self._timeout == 0:
            return
        remaining = deadline.remaining()
        if remaining <= 0:
            raise TimeoutError("the exchange as a whole took too long")
        self._socket.settimeout(
            remaining if self._timeout is None else min(self._timeout, remaining)
        )


class DeadlineConnection(Connection):
    """A connection whose socket keeps to deadlines, with TLS or without.

    One TLS context serves all: redis-py's own class reads the authorities anew for each connection,
    which takes longer than a look-up may.
    """

    stream: DeadlineSocket  # of the last connect

    def __init__(self, *, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> DeadlineSocket:
        connected = super()._connect()  # type: ignore[no-untyped-call]
        if self._tls is not None:
            connected = self._encrypt(connected, self._tls)
        self.stream = DeadlineSocket(connected)
        return self.stream

    def _encrypt(self, plain: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        deadline = _deadline.get()
        if deadline is not None:
            # Of the handshake as a whole, which has several exchanges.
            plain.settimeout(max(deadline.remaining(), 0.001))
        try:
            encrypted = tls.wrap_socket(plain, server_hostname=self.host)
        except OSError:
            plain.close()
            raise
        encrypted.settimeout(self.socket_timeout)
        return encrypted


def _progress(num_bytes: int) -> None:
    deadline = _deadline.get()
    if deadline is not None:
        deadline.progress(num_bytes)
