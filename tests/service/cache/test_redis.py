"""The cache over a Redis that works."""

import asyncio
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.cache.entry import CHECKSUM_BYTES, FORMAT, dump
from tests.service.cache.helpers import (
    MIB,
    make_cache,
    make_entry,
    value_of,
    values_of,
    wait_until,
)

pytestmark = pytest.mark.redis


def get_many(opened, keys):
    return values_of(asyncio.run(opened.cache.get_many(keys)))


def store(server, **values):
    """Put entries into Redis as another replica would."""
    with server.admin() as admin:
        for key, value in values.items():
            admin.set(f"refinery:{key}", dump(make_entry(value), key))


def wait_for_writes(opened, count):
    wait_until(
        lambda: (
            opened.count("written_bytes_total") >= count * make_entry().num_bytes
            and opened.count("write_queue_bytes") == 0
        )
    )


def test_what_was_put_is_found_by_another_replica(server, open_cache):
    first, second = open_cache(server.address()), open_cache(server.address())

    first.cache.put("a", make_entry(1))
    wait_for_writes(first, 1)

    assert get_many(second, ["a"]) == [1]
    assert second.lookups("hit") == 1


def test_a_key_that_nobody_put_is_a_miss(server, open_cache):
    opened = open_cache(server.address())

    assert get_many(opened, ["a"]) == [None]
    assert opened.lookups("miss") == 1
    assert opened.errors() == 0


def test_no_keys_are_no_look_up(server, open_cache):
    opened = open_cache(server.address(), memory_bytes=MIB)

    assert get_many(opened, []) == []
    assert opened.count("lookup_seconds_count", tier="redis") == 0


def test_hits_misses_and_repeated_keys_come_back_in_their_places(server, open_cache):
    store(server, a=1, c=3)
    opened = open_cache(server.address(), memory_bytes=MIB)
    opened.cache.put("m", make_entry(9))

    found = get_many(opened, ["x", "c", "m", "a", "c", "x", "m"])

    assert found == [None, 3, 9, 1, 3, None, 9]
    assert (opened.lookups("hit", "memory"), opened.lookups("miss", "memory")) == (1, 3)
    assert (opened.lookups("hit"), opened.lookups("miss")) == (2, 1)


def test_one_mget_asks_for_all_that_memory_lacks(server, open_cache):
    opened = open_cache(server.address(), memory_bytes=MIB)
    opened.cache.put("m", make_entry())
    wait_for_writes(opened, 1)
    with server.admin(decode_responses=True) as admin, admin.monitor() as monitor:
        get_many(opened, ["a", "m", "b", "a"])
        admin.echo("end")
        seen = []
        for command in monitor.listen():
            seen.append(command["command"])
            if command["command"] == "ECHO end":
                break

    assert [command for command in seen if "GET" in command] == ["MGET refinery:a refinery:b"]


def test_what_redis_had_is_in_memory_from_then_on(server, open_cache):
    store(server, a=1)
    opened = open_cache(server.address(), memory_bytes=MIB)

    get_many(opened, ["a"])
    server.kill()

    assert get_many(opened, ["a"]) == [1]
    assert opened.lookups("hit", "memory") == 1


def test_without_memory_every_look_up_asks_redis(server, open_cache):
    store(server, a=1)
    opened = open_cache(server.address(), memory_bytes=0)

    get_many(opened, ["a"])
    get_many(opened, ["a"])

    assert opened.lookups("hit") == 2


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_mix_of_hits_and_misses_is_index_exact(server, data):
    keys = st.sampled_from([f"k{index}" for index in range(8)])
    in_redis = data.draw(st.sets(keys))
    in_memory = data.draw(st.sets(keys))
    asked = data.draw(st.lists(keys, max_size=20))
    with server.admin() as admin:
        admin.flushall()
    store(server, **{key: float(key[1:]) for key in in_redis})
    opened = make_cache(server.address(), memory_bytes=MIB)
    for key in in_memory:
        opened.cache._memory.put(key, make_entry(float(key[1:])))

    found = get_many(opened, asked)
    asyncio.run(opened.cache.close(1.0))

    kept = in_redis | in_memory
    assert found == [float(key[1:]) if key in kept else None for key in asked]


def test_values_are_kept_for_their_time(server, open_cache):
    opened = open_cache(server.address(), ttl_seconds=1234)

    opened.cache.put("a", make_entry())
    wait_for_writes(opened, 1)

    with server.admin() as admin:
        assert 1230 <= admin.ttl("refinery:a") <= 1234


def test_a_value_that_is_asked_for_is_kept_longer(server, open_cache):
    store(server, a=1)
    opened = open_cache(server.address(), ttl_seconds=1234)
    with server.admin() as admin:
        admin.expire("refinery:a", 100)

        get_many(opened, ["a"])

        wait_until(lambda: admin.ttl("refinery:a") > 1000)


def test_entries_beyond_the_largest_size_are_not_kept(server, open_cache):
    opened = open_cache(server.address(), memory_bytes=MIB, max_value_bytes=1000)

    opened.cache.put("large", make_entry(num_bytes=2000))
    opened.cache.put("small", make_entry())
    wait_for_writes(opened, 1)

    assert opened.count("dropped_writes_total", reason="too_large") == 1
    assert get_many(opened, ["large", "small"]) == [None, 0]
    with server.admin() as admin:
        assert admin.keys() == [b"refinery:small"]


def test_values_of_megabytes_go_there_and_back(server, open_cache):
    opened = open_cache(server.address())
    for index in range(6):
        opened.cache.put(f"k{index}", make_entry(index, num_bytes=4 * MIB))
    wait_until(lambda: opened.count("written_bytes_total") > 24 * MIB)

    found = get_many(opened, [f"k{index}" for index in range(6)])

    assert found == [0, 1, 2, 3, 4, 5]
    assert opened.count("read_bytes_total") == opened.count("written_bytes_total")


def flip(server, key, position):
    with server.admin() as admin:
        data = bytearray(admin.get(f"refinery:{key}"))
        data[position] ^= 0xFF
        admin.set(f"refinery:{key}", bytes(data))


HEADER = len(FORMAT) + CHECKSUM_BYTES + 8


@pytest.mark.parametrize(
    "position",
    [0, len(FORMAT) - 1, len(FORMAT), HEADER - 9, HEADER - 8, HEADER, HEADER + 30, -400, -200, -1],
    ids=[
        "format", "version", "checksum", "end of checksum", "header length", "header", "in header",
        "first of tensor", "in tensor", "last of tensor",
    ],
)  # fmt: skip
def test_a_flipped_byte_in_redis_is_a_miss_that_is_counted_and_deleted(
    server, open_cache, position
):
    store(server, a=1, b=2)
    flip(server, "a", position)
    opened = open_cache(server.address(), memory_bytes=MIB)

    assert get_many(opened, ["a", "b"]) == [None, 2]

    assert opened.count("errors_total", kind="corrupt") == 1
    assert opened.lookups("miss") == 1
    with server.admin() as admin:
        wait_until(lambda: not admin.exists("refinery:a"))
        assert admin.exists("refinery:b")


@pytest.mark.parametrize("data", [b"", b"short", b"\0" * 5000])
def test_what_another_program_wrote_is_a_miss(server, open_cache, data):
    with server.admin() as admin:
        admin.set("refinery:a", data)
    opened = open_cache(server.address())

    assert get_many(opened, ["a"]) == [None]
    assert opened.count("errors_total", kind="corrupt") == 1


def test_the_value_of_another_key_is_a_miss(server, open_cache):
    store(server, a=1)
    with server.admin() as admin:
        admin.copy("refinery:a", "refinery:b")
    opened = open_cache(server.address())

    assert get_many(opened, ["b"]) == [None]
    assert opened.count("errors_total", kind="corrupt") == 1


def test_a_key_of_another_type_is_a_miss(server, open_cache):
    with server.admin() as admin:
        admin.lpush("refinery:a", "x")
    opened = open_cache(server.address())

    assert get_many(opened, ["a"]) == [None]


def test_corruption_is_logged_once_and_opens_no_breaker(server, open_cache, caplog):
    with server.admin() as admin:
        admin.mset({f"refinery:k{index}": b"junk" for index in range(20)})
    opened = open_cache(server.address())

    for index in range(20):
        get_many(opened, [f"k{index}"])

    assert opened.count("errors_total", kind="corrupt") == 20
    assert opened.count("breaker_open") == 0
    assert sum("not what was written" in record.message for record in caplog.records) == 1


def test_many_requests_at_once_each_get_their_own(server, open_cache):
    store(server, **{f"k{index}": index for index in range(40)})
    opened = open_cache(server.address())

    async def ask():
        asked = [[f"k{index}", "x", f"k{(index + 1) % 40}"] for index in range(40)]
        return await asyncio.gather(*(opened.cache.get_many(keys) for keys in asked))

    found = asyncio.run(ask())

    for index, entries in enumerate(found):
        # None also where no thread was free in time, which is counted.
        assert value_of(entries[0]) in (index, None)
        assert entries[1] is None
        assert value_of(entries[2]) in ((index + 1) % 40, None)
    assert opened.lookups("hit") + opened.lookups("skipped") + opened.lookups("miss") == 120
    assert opened.lookups("hit") > 0


def test_the_event_loop_goes_on_while_values_are_read(server, open_cache):
    opened = open_cache(server.address())
    server.pause()

    async def watch():
        ticks = 0
        look_up = asyncio.ensure_future(opened.cache.get_many(["a"]))
        while not look_up.done() and ticks < 10:
            await asyncio.sleep(0.005)
            ticks += 1
        server.resume()
        await look_up
        return ticks

    assert asyncio.run(watch()) == 10


def test_a_request_that_is_cancelled_leaves_the_cache_in_order(server, open_cache):
    store(server, a=1)
    opened = open_cache(server.address())
    server.pause()

    async def cancel():
        look_ups = [asyncio.ensure_future(opened.cache.get_many(["a"])) for _ in range(20)]
        await asyncio.sleep(0.02)
        for look_up in look_ups:
            look_up.cancel()
        return await asyncio.gather(*look_ups, return_exceptions=True)

    results = asyncio.run(cancel())
    server.resume()

    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert get_many(opened, ["a"]) == [1]
    assert opened.count("breaker_open") == 0


def test_putting_never_waits_and_a_full_queue_drops_the_newest(server, open_cache):
    opened = open_cache(server.address(), max_queue_writes=4)
    opened.cache.put("first", make_entry())
    wait_for_writes(opened, 1)
    server.pause()
    begin = time.monotonic()

    for index in range(100):
        opened.cache.put(f"k{index}", make_entry(index))
    seconds = time.monotonic() - begin
    server.resume()

    assert seconds < 0.5
    wait_until(lambda: opened.count("write_queue_bytes") == 0)
    dropped = opened.count("dropped_writes_total", reason="queue_full")
    assert dropped >= 90
    with server.admin() as admin:
        wait_until(lambda: admin.dbsize() == 101 - dropped)
        # What had a place kept it. Which of the others found one depends on when the writer ran.
        assert admin.exists(*(f"refinery:k{index}" for index in range(4))) == 4


def test_the_queue_is_bounded_in_bytes_too(server, open_cache):
    opened = open_cache(server.address(), max_queue_bytes=2 * MIB, max_value_bytes=MIB)
    server.pause()

    for index in range(40):
        opened.cache.put(f"k{index}", make_entry(num_bytes=MIB // 2))

    assert opened.count("write_queue_bytes") <= 2 * MIB
    assert opened.count("dropped_writes_total", reason="queue_full") > 0
    server.resume()


def test_closing_writes_what_waits(server, open_cache):
    opened = open_cache(server.address())
    for index in range(200):
        opened.cache.put(f"k{index}", make_entry())

    asyncio.run(opened.cache.close(10.0))

    with server.admin() as admin:
        assert admin.dbsize() == 200


def test_closing_gives_up_in_time_and_counts_what_was_lost(server, open_cache, caplog):
    opened = open_cache(server.address())
    opened.cache.put("first", make_entry())
    wait_for_writes(opened, 1)
    server.pause()
    for index in range(200):
        opened.cache.put(f"k{index}", make_entry())
    begin = time.monotonic()

    asyncio.run(opened.cache.close(0.2))
    seconds = time.monotonic() - begin
    server.resume()

    assert seconds < 1.0
    assert opened.count("dropped_writes_total", reason="closed") >= 100
    assert "writes in the 0.2 s before the service ended" in caplog.text


def test_a_closed_cache_answers_misses_and_drops_writes(server, open_cache):
    store(server, a=1)
    opened = open_cache(server.address())
    asyncio.run(opened.cache.close(1.0))

    opened.cache.put("b", make_entry())

    assert get_many(opened, ["a"]) == [None]
    assert opened.lookups("skipped") == 1
    assert opened.count("dropped_writes_total", reason="closed") == 1


def test_closing_twice_is_closing_once(server, open_cache):
    opened = open_cache(server.address())

    asyncio.run(opened.cache.close(1.0))
    asyncio.run(opened.cache.close(1.0))


def test_no_thread_and_no_connection_is_left_behind(server):
    before = set(threading.enumerate())
    for _ in range(3):
        opened = make_cache(server.address())
        opened.cache.start()
        opened.cache.put("a", make_entry())
        get_many(opened, ["a"])
        asyncio.run(opened.cache.close(5.0))

    assert set(threading.enumerate()) <= before
    with server.admin() as admin:
        wait_until(lambda: len(admin.client_list()) == 1)


def test_a_cache_that_never_started_can_be_closed(server):
    asyncio.run(make_cache(server.address()).cache.close(1.0))
