import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.cache import CacheMetrics, Entry
from service.cache.memory import OVERHEAD_BYTES, MemoryCache
from tests.service.cache.helpers import make_entry, value_of

# Of an entry of `make_entry` under a key of one letter: tensor, its name, metadata, key.
COST = 400 + len("features") + len("value0.0") + 1 + OVERHEAD_BYTES


def make_cache(max_bytes):
    registry = CollectorRegistry()
    return MemoryCache(max_bytes, CacheMetrics(registry)), registry


def test_what_is_put_is_found():
    cache, _ = make_cache(8 * COST)

    cache.put("a", make_entry(1))

    assert value_of(cache.get("a")) == 1
    assert cache.get("b") is None


def test_the_one_not_used_for_longest_makes_room():
    cache, _ = make_cache(4 * COST)
    for key in "abcd":
        cache.put(key, make_entry())

    cache.get("a")
    cache.put("e", make_entry())

    assert [key for key in "abcde" if cache.get(key)] == list("acde")


def test_a_key_put_again_has_the_new_value_and_counts_once():
    cache, _ = make_cache(8 * COST)

    cache.put("a", make_entry(1))
    cache.put("a", make_entry(2))

    assert value_of(cache.get("a")) == 2
    assert (len(cache), cache.num_bytes) == (1, COST)


def test_an_entry_of_more_than_a_quarter_pushes_nothing_out():
    cache, registry = make_cache(4 * COST)
    cache.put("a", make_entry())

    is_kept = cache.put("b", make_entry(num_bytes=404))

    assert not is_kept
    assert cache.get("a")
    assert cache.get("b") is None
    reason = {"reason": "too_large_for_memory"}
    assert registry.get_sample_value("refinery_cache_dropped_writes_total", reason) == 1


def test_an_entry_that_is_too_large_takes_the_old_value_of_its_key_away():
    cache, _ = make_cache(4 * COST)
    cache.put("a", make_entry(1))

    cache.put("a", make_entry(2, num_bytes=4000))

    assert cache.get("a") is None
    assert cache.num_bytes == 0


def test_entries_without_tensors_are_bounded_too():
    cache, _ = make_cache(10 * OVERHEAD_BYTES)

    for index in range(1000):
        cache.put(str(index), Entry({}, {}))

    assert len(cache) < 10


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3000), st.booleans()), max_size=40
    )
)
def test_the_bound_holds_and_the_sum_is_right_after_any_use(steps):
    cache, registry = make_cache(8 * 1024)

    for key, num_bytes, is_read in steps:
        if is_read:
            cache.get(key)
        else:
            cache.put(key, make_entry(num_bytes=num_bytes))

        kept = [(key, entry) for key in "abcdefgh" if (entry := cache.get(key))]
        assert cache.num_bytes <= cache.max_bytes
        assert cache.num_bytes == sum(
            entry.num_bytes + len(key) + OVERHEAD_BYTES for key, entry in kept
        )
        assert registry.get_sample_value("refinery_cache_bytes") == cache.num_bytes
        assert registry.get_sample_value("refinery_cache_entries") == len(kept)


class CountedKey(str):
    """A key that counts how often any key was hashed or compared."""

    count = 0

    def __hash__(self):
        CountedKey.count += 1
        return super().__hash__()

    def __eq__(self, other):
        CountedKey.count += 1
        return super().__eq__(other)


def operations(work):
    """Calls into Python and C, and uses of keys, of `work`."""
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    CountedKey.count = 0
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls, CountedKey.count


@pytest.mark.parametrize("num_entries", [4, 40, 4000])
def test_a_miss_that_pushes_one_out_costs_the_same_however_many_there_are(num_entries):
    def cost_of_a_miss(size):
        entry = make_entry()
        keys = [CountedKey(f"{index:06}") for index in range(size + 1)]
        cache, _ = make_cache(size * (COST + 5))
        for key in keys[:-1]:
            cache.put(key, entry)
        assert len(cache) == size
        cost = operations(lambda: (cache.get(keys[-1]), cache.put(keys[-1], entry)))
        assert len(cache) == size
        return cost

    assert cost_of_a_miss(num_entries) == cost_of_a_miss(4)


def test_threads_may_use_it_together():
    cache, _ = make_cache(20 * COST)
    failures = []

    def work(offset):
        for index in range(300):
            key = str((index * 7 + offset) % 50)
            entry = cache.get(key)
            if entry is not None and value_of(entry) != float(key):
                failures.append(key)
            cache.put(key, make_entry(float(key)))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    assert cache.num_bytes <= cache.max_bytes


def test_a_cleared_cache_is_empty():
    cache, _ = make_cache(8 * COST)
    cache.put("a", make_entry())

    cache.clear()

    assert cache.get("a") is None
    assert (len(cache), cache.num_bytes) == (0, 0)
