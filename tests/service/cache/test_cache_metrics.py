import asyncio
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service.cache import CacheMetrics, FeatureCache
from service.cache.memory import MemoryCache
from tests.service.cache.helpers import MIB, make_entry

PROMTOOL = shutil.which("promtool")


def used_registry():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    cache = FeatureCache(metrics, memory=MemoryCache(MIB, metrics), max_value_bytes=MIB)
    cache.put("a", make_entry())
    asyncio.run(cache.get_many(["a", "b"]))
    metrics.errors("timeout")
    metrics.dropped_writes("queue_full")
    return registry


def test_every_metric_has_the_prefix():
    text = generate_latest(used_registry()).decode()

    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert names
    assert all(name.startswith("refinery_cache_") for name in names)


def test_every_series_is_there_before_anything_happens():
    registry = CollectorRegistry()
    num_series = len(generate_latest(registry).splitlines())
    assert num_series == 0

    CacheMetrics(registry)
    before = {line.rsplit(" ", 1)[0] for line in generate_latest(registry).decode().splitlines()}
    after = {
        line.rsplit(" ", 1)[0] for line in generate_latest(used_registry()).decode().splitlines()
    }

    assert before == after


def test_a_look_up_in_memory_counts_each_key_once():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    cache = FeatureCache(metrics, memory=MemoryCache(MIB, metrics), max_value_bytes=MIB)
    cache.put("a", make_entry())

    asyncio.run(cache.get_many(["a", "b", "a", "b", "c"]))

    def count(result):
        labels = {"tier": "memory", "result": result}
        return registry.get_sample_value("refinery_cache_lookups_total", labels)

    assert (count("hit"), count("miss")) == (1, 2)
    seconds = {"tier": "memory"}
    assert registry.get_sample_value("refinery_cache_lookup_seconds_count", seconds) == 1


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool is installed (Debian: prometheus)")
def test_promtool_finds_nothing_to_say():
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=generate_latest(used_registry()),
        capture_output=True,
        timeout=60,
    )

    assert checked.stdout + checked.stderr == b""
    assert checked.returncode == 0
