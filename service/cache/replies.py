"""Reads values of megabytes from Redis straight into the memory that their tensors will use.

redis-py gathers an answer in a buffer that grows, and then copies each value out of it twice,
which takes longer than the way from Redis to here.
"""

import numpy as np
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError

from service.cache.connection import DeadlineConnection, DeadlineSocket

_END = b"\r\n"
_CHUNK_BYTES = 64 * 1024
_LONGEST_VALUE = 512 * 1024 * 1024  # of Redis itself


def read_values(connection: DeadlineConnection, count: int) -> list[memoryview | None]:
    """The answer to an MGET of `count` keys, which has been sent: writable memory, None: no value.

    Whatever it raises, the connection is of no use afterwards.

    Raises:
        ResponseError: Redis refuses.
        InvalidResponse: it is no such answer.
        RedisConnectionError: it ends early.
        TimeoutError: it takes longer than the timeout or deadline.
    """
    reader = _Reader(connection.stream)
    num_values = _number(reader.line(), b"*")
    if num_values != count:
        raise InvalidResponse(f"MGET of {count} keys was answered with {num_values} values")
    values: list[memoryview | None] = []
    for _ in range(count):
        length = _number(reader.line(), b"$")
        values.append(None if length == -1 else reader.string(length))
    reader.check_end()
    return values


class _Reader:
    def __init__(self, source: DeadlineSocket) -> None:
        self._source = source
        self._read_ahead = b""

    def line(self) -> bytes:
        while _END not in self._read_ahead:
            if len(self._read_ahead) > _CHUNK_BYTES:
                raise InvalidResponse("a line of the answer has no end")
            data = self._source.recv(_CHUNK_BYTES)
            _check(len(data))
            self._read_ahead += data
        line, _, self._read_ahead = self._read_ahead.partition(_END)
        return line

    def string(self, length: int) -> memoryview:
        if not 0 <= length <= _LONGEST_VALUE:
            raise InvalidResponse(f"a value has a length of {length}")
        # Not a bytearray, which would first be filled with zeros.
        value = np.empty(length, np.uint8).data
        position = min(length, len(self._read_ahead))
        value[:position] = self._read_ahead[:position]
        self._read_ahead = self._read_ahead[position:]
        while position < length:
            received = self._source.recv_into(value[position:])
            _check(received)
            position += received
        if self.line():
            raise InvalidResponse("a value is longer than its length")
        return value

    def check_end(self) -> None:
        if self._read_ahead:
            raise InvalidResponse("there is more than the answer")


def _number(line: bytes, kind: bytes) -> int:
    if line[:1] == b"-":
        raise ResponseError(line[1:200].decode(errors="replace"))
    if line[:1] != kind:
        raise InvalidResponse(f"the answer has {line[:20]!r} where {kind!r} and a number belong")
    try:
        return int(line[1:])
    except ValueError:
        raise InvalidResponse(f"the answer has {line[:20]!r}, which is no number") from None


def _check(num_bytes: int) -> None:
    if num_bytes == 0:
        raise RedisConnectionError("Redis closed the connection")
