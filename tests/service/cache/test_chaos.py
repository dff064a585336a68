"""The cache over a Redis that is slow, dead, full, restarted or locked."""

import asyncio
import logging
import time

import pytest

from service.cache.address import RedisAddress
from tests.service.cache.helpers import (
    MIB,
    RedisServer,
    comes_true,
    make_entry,
    values_of,
    wait_until,
)

pytestmark = pytest.mark.redis

# The service's own.
SHORT = {"connect_seconds": 0.05, "read_seconds": 0.1}


def get_many(opened, keys):
    return values_of(asyncio.run(opened.cache.get_many(keys)))


def is_stored(opened, key):
    opened.cache.put(key, make_entry(1))
    return comes_true(lambda: get_many(opened, [key]) == [1], seconds=0.3)


def messages(caplog, level):
    return [record.message for record in caplog.records if record.levelno == level]


def test_a_killed_server_is_a_miss_and_then_is_not_asked(server, open_cache):
    opened = open_cache(server.address(), **SHORT)
    assert is_stored(opened, "a") or opened.errors()
    server.kill()

    for _ in range(10):
        assert get_many(opened, ["a"]) == [None]

    assert opened.count("breaker_open") == 1
    assert opened.count("errors_total", kind="connection") >= 1
    assert opened.lookups("skipped") >= 5


def test_a_stopped_server_costs_the_timeouts_and_then_nothing(server, open_cache):
    opened = open_cache(server.address(), **SHORT)
    get_many(opened, ["a"])
    server.pause()

    while not opened.count("breaker_open"):
        begin = time.monotonic()
        assert get_many(opened, ["a"]) == [None]
        assert time.monotonic() - begin < 1.0
    asked = opened.count("lookup_seconds_count", tier="redis")
    failed, skipped = opened.errors(), opened.lookups("skipped")
    for _ in range(20):
        assert get_many(opened, ["a"]) == [None]
    server.resume()

    # Of twenty look-ups only those that probed, one in a second, asked at all.
    probes = opened.count("lookup_seconds_count", tier="redis") - asked
    assert probes <= 2
    assert opened.errors() - failed <= probes
    assert opened.lookups("skipped") - skipped == 20 - probes


def test_twenty_requests_that_meet_a_stopped_server_wait_together(server, open_cache):
    opened = open_cache(server.address(), **SHORT)
    get_many(opened, ["a"])
    server.pause()

    async def ask():
        return await asyncio.gather(*(opened.cache.get_many(["a"]) for _ in range(20)))

    begin = time.monotonic()
    found = asyncio.run(ask())
    seconds = time.monotonic() - begin
    server.resume()

    assert found == [[None]] * 20
    assert seconds < 1.0
    assert opened.lookups("error") + opened.lookups("skipped") == 20


def test_a_stopped_server_is_used_again_when_it_goes_on(server, open_cache, caplog):
    caplog.set_level(logging.INFO)
    opened = open_cache(server.address(), **SHORT)
    server.pause()
    for _ in range(10):
        get_many(opened, ["a"])
    assert opened.count("breaker_open") == 1

    server.resume()

    wait_until(lambda: is_stored(opened, "a"))
    assert opened.count("breaker_open") == 0
    left_alone = [text for text in messages(caplog, logging.WARNING) if "is left alone" in text]
    again = [text for text in messages(caplog, logging.INFO) if "answers again" in text]
    assert len(left_alone) == len(again)


def test_a_server_that_was_restarted_is_used_again(server, open_cache):
    opened = open_cache(server.address())
    assert is_stored(opened, "a")

    server.kill()
    get_many(opened, ["a"])
    server.start()

    wait_until(lambda: is_stored(opened, "b"))


def test_connections_that_a_restart_cut_do_not_count_as_failures(server, open_cache):
    opened = open_cache(server.address())

    async def ask():
        await asyncio.gather(*(opened.cache.get_many(["a"]) for _ in range(16)))

    asyncio.run(ask())
    opened.cache.put("a", make_entry())
    wait_until(lambda: opened.count("written_bytes_total") > 0)
    server.kill()
    server.start()
    asyncio.run(ask())

    assert opened.errors() == 0
    assert opened.lookups("error") == 0


def test_writes_are_dropped_and_counted_while_the_server_is_dead(server, open_cache):
    opened = open_cache(server.address(), **SHORT)
    server.kill()
    for _ in range(6):
        get_many(opened, ["a"])

    opened.cache.put("a", make_entry())

    assert opened.count("dropped_writes_total", reason="breaker_open") == 1
    assert opened.count("write_queue_bytes") == 0


def test_writes_alone_find_out_that_the_server_is_back(server, open_cache):
    opened = open_cache(server.address(), **SHORT)
    server.kill()
    for _ in range(6):
        get_many(opened, ["a"])
    assert opened.count("breaker_open") == 1

    server.start()

    def put():
        opened.cache.put("a", make_entry())
        return opened.count("written_bytes_total") > 0

    wait_until(put)
    assert opened.count("breaker_open") == 0


def test_a_server_that_is_dead_from_the_start_is_a_warning(tmp_path, open_cache, caplog):
    absent = RedisServer(tmp_path)

    opened = open_cache(absent.address(), memory_bytes=MIB, **SHORT)
    opened.cache.put("a", make_entry(1))

    wait_until(lambda: "cannot be used now (ConnectionError" in caplog.text)
    assert get_many(opened, ["a", "b"]) == [1, None]


def test_a_server_that_starts_later_is_used(tmp_path, open_cache):
    late = RedisServer(tmp_path)
    opened = open_cache(late.address())
    for _ in range(6):
        get_many(opened, ["a"])

    late.start()
    try:
        wait_until(lambda: is_stored(opened, "a"))
    finally:
        late.kill()


def test_a_host_without_address_is_a_miss(open_cache):
    opened = open_cache(RedisAddress("no-such-host.invalid"), **SHORT)

    begin = time.monotonic()
    assert get_many(opened, ["a"]) == [None]
    assert time.monotonic() - begin < 1.0
    assert opened.lookups("error") == 1


def test_a_full_server_refuses_writes_which_is_logged_once_and_reads_go_on(
    make_server, open_cache, caplog
):
    full = make_server("--maxmemory-policy", "noeviction")
    opened = open_cache(full.address())
    assert is_stored(opened, "a")
    with full.admin() as admin:
        admin.config_set("maxmemory", "1mb")

    for index in range(10):
        opened.cache.put(f"k{index}", make_entry(num_bytes=MIB))
    wait_until(lambda: opened.count("dropped_writes_total", reason="refused") >= 9)

    assert opened.count("errors_total", kind="full") >= 9
    assert opened.count("breaker_open") == 0
    assert get_many(opened, ["a"]) == [1]
    assert sum("refuses to store" in text for text in messages(caplog, logging.WARNING)) == 1


def test_a_server_with_room_again_is_written_to_again(make_server, open_cache, caplog):
    caplog.set_level(logging.INFO)
    full = make_server("--maxmemory-policy", "noeviction", "--maxmemory", "1kb")
    opened = open_cache(full.address())
    opened.cache.put("a", make_entry(1))
    wait_until(lambda: opened.count("dropped_writes_total", reason="refused") == 1)
    with full.admin() as admin:
        admin.config_set("maxmemory", "0")

    opened.cache.put("b", make_entry(2))

    wait_until(lambda: get_many(opened, ["b"]) == [2])
    wait_until(lambda: "stores features again" in caplog.text)


def test_a_server_that_evicts_takes_every_write(make_server, open_cache):
    evicting = make_server("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
    opened = open_cache(evicting.address())

    for index in range(20):
        opened.cache.put(f"k{index}", make_entry(index, num_bytes=MIB))
    wait_until(lambda: opened.count("written_bytes_total") > 20 * MIB)

    found = get_many(opened, [f"k{index}" for index in range(20)])
    assert opened.errors() == 0
    assert 0 < len([value for value in found if value is not None]) < 20
    assert all(value in (None, index) for index, value in enumerate(found))


def test_a_user_that_may_only_read_reads(server, open_cache, caplog):
    with server.admin() as admin:
        admin.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+ping")
    writer = open_cache(server.address())
    assert is_stored(writer, "a")
    reader = open_cache(server.address(username="reader", password="secret"))

    reader.cache.put("b", make_entry())

    wait_until(lambda: reader.count("dropped_writes_total", reason="refused") == 1)
    assert get_many(reader, ["a"]) == [1]
    assert reader.count("breaker_open") == 0
    assert "what its user may do" in caplog.text


@pytest.mark.parametrize("password", ["s3same", None])
def test_without_the_right_password_nothing_is_found_and_nothing_told(
    make_server, open_cache, caplog, password
):
    caplog.set_level(logging.DEBUG)
    locked = make_server("--requirepass", "0pen-s3same")
    opened = open_cache(locked.address(password=password))

    for _ in range(6):
        assert get_many(opened, ["a"]) == [None]

    assert opened.count("breaker_open") == 1
    assert opened.count("errors_total", kind="other") >= 5
    assert "cannot be used now (AuthenticationError" in caplog.text
    assert "s3same" not in caplog.text
    assert "s3same" not in repr(opened.remote)
