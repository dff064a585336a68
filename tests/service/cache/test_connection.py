import asyncio
import socket
import threading
import time

import pytest

from service.cache.address import RedisAddress
from service.cache.connection import Deadline
from tests.service.cache.fake_servers import tcp_server
from tests.service.cache.helpers import MIB


def look_up(opened, *keys):
    return asyncio.run(opened.cache.get_many(keys or ("k",)))


def test_a_trickle_buys_no_time_and_a_flow_does():
    deadline = Deadline(1.0, max_seconds=10.0, bytes_per_second=MIB)

    deadline.progress(10)
    assert deadline.remaining() < 1.001

    deadline.progress(2 * MIB)
    assert 2.5 < deadline.remaining() <= 3.001


def test_no_flow_buys_more_than_the_longest_time():
    deadline = Deadline(1.0, max_seconds=2.0, bytes_per_second=MIB)

    deadline.progress(100 * MIB)

    assert deadline.remaining() <= 2.0


def test_a_server_that_trickles_is_held_to_the_deadline_of_the_whole(open_cache):
    def trickle(connection):
        connection.sendall(b"*1\r\n$1000000\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    with tcp_server(trickle) as port:
        opened = open_cache(RedisAddress("127.0.0.1", port), connect_seconds=0.05, read_seconds=0.1)
        begin = time.monotonic()
        entries = look_up(opened)
        seconds = time.monotonic() - begin

    assert entries == [None]
    assert seconds < 1.0
    assert opened.lookups("error") == 1


def test_a_thread_that_was_held_up_by_a_trickle_comes_back(open_cache):
    def trickle(connection):
        connection.sendall(b"*1\r\n$1000000\r\n")
        for _ in range(300):
            connection.sendall(b"x")
            time.sleep(0.02)

    with tcp_server(trickle) as port:
        opened = open_cache(RedisAddress("127.0.0.1", port), connect_seconds=0.05, read_seconds=0.1)
        look_up(opened)
        begin = time.monotonic()
        asyncio.run(opened.cache.close(5.0))
        seconds = time.monotonic() - begin

    # Left alone it would have read for six seconds.
    assert seconds < 2.0


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$abc\r\n",
        b"*1\r\n:7\r\n",
        b"*2\r\n$-1\r\n$-1\r\n",
        b"*1\r\n$3\r\nabcdef\r\n",
        b"*1\r\n$9\r\nabc\r\n",
        b"*1\r\n$-5\r\n",
        b"*1\r\n$999999999999\r\n",
        b"*1\r\n$-1\r\nmore",
        b"*x\r\n",
        b"x" * 300_000,
        b"*-1\r\n",
        b":1\r\n",
        b"+OK\r\n",
        b"-ERR planted\r\n",
        b"-LOADING planted\r\n",
        b"\r\n",
        b"",
    ],
)
def test_whatever_a_server_says_is_a_miss_and_counted(open_cache, text):
    def answer(connection):
        connection.sendall(text)
        if not text:
            connection.close()

    with tcp_server(answer) as port:
        opened = open_cache(RedisAddress("127.0.0.1", port), connect_seconds=0.2, read_seconds=0.2)
        assert look_up(opened) == [None]
        asyncio.run(opened.cache.close(1.0))

    assert opened.lookups("error") == 1
    assert opened.errors() >= 1


def test_a_server_that_says_garbage_opens_the_breaker(open_cache):
    with tcp_server(lambda connection: connection.sendall(b"garbage\r\n")) as port:
        opened = open_cache(RedisAddress("127.0.0.1", port))
        for _ in range(6):
            look_up(opened)
        asyncio.run(opened.cache.close(1.0))

    assert opened.lookups("skipped") >= 1
    assert opened.count("breaker_open") == 1


@pytest.fixture
def hanging_names(monkeypatch):
    """An event until which nobody gets the address of a host."""
    released = threading.Event()

    def hang(*_arguments):
        released.wait(20)
        raise socket.gaierror("planted")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield released
    released.set()


def test_a_name_service_that_hangs_holds_up_no_request_and_opens_the_breaker(
    hanging_names, open_cache
):
    opened = open_cache(RedisAddress("cache"), connect_seconds=0.05, read_seconds=0.1)

    for _ in range(6):
        begin = time.monotonic()
        assert look_up(opened) == [None]
        assert time.monotonic() - begin < 1.0

    hanging_names.set()

    assert opened.lookups("error") == 5
    assert opened.lookups("skipped") == 1
    assert opened.count("errors_total", kind="timeout") == 5
    assert opened.count("breaker_open") == 1


def test_requests_that_get_no_thread_are_skipped_and_say_nothing_against_redis(
    hanging_names, open_cache
):
    opened = open_cache(RedisAddress("cache"), connect_seconds=0.05, read_seconds=5.0)

    async def ask():
        busy = [asyncio.ensure_future(opened.cache.get_many(["a"])) for _ in range(8)]
        await asyncio.sleep(0.05)
        entries = await opened.cache.get_many(["b", "c"])
        hanging_names.set()
        await asyncio.gather(*busy)
        return entries

    assert asyncio.run(ask()) == [None, None]
    assert opened.lookups("skipped") >= 2


def test_closing_leaves_a_thread_behind_that_hangs_and_says_so(hanging_names, open_cache, caplog):
    opened = open_cache(RedisAddress("cache"), connect_seconds=0.05, read_seconds=0.1)
    look_up(opened)

    async def close():
        begin = time.monotonic()
        await opened.cache.close(0.2)
        seconds = time.monotonic() - begin
        hanging_names.set()  # for asyncio ends its threads too
        return seconds

    assert asyncio.run(close()) < 1.0
    assert "still hangs" in caplog.text
