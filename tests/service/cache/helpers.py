"""A real Redis of one's own, entries to put there, and metrics as numbers."""

import shutil
import signal
import socket
import subprocess
import time

import redis
import torch
from prometheus_client import CollectorRegistry
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.cache import CacheMetrics, Entry, FeatureCache
from service.cache.address import RedisAddress
from service.cache.memory import MemoryCache
from service.cache.remote import RedisCache

REDIS_SERVER = shutil.which("redis-server")
MIB = 1024 * 1024


def make_entry(value=0.0, *, num_bytes=400):
    tensors = {"features": torch.full((num_bytes // 4,), float(value))}
    return Entry(tensors, {"value": str(float(value))})


def value_of(entry):
    """What `make_entry` was called with; None for no entry."""
    return None if entry is None else float(entry.metadata["value"])


def values_of(entries):
    return [value_of(entry) for entry in entries]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def comes_true(is_true, *, seconds):
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def wait_until(is_true, *, seconds=10.0):
    assert comes_true(is_true, seconds=seconds), f"it did not come true in {seconds} s"


class RedisServer:
    """A redis-server without persistence; `start` it again after `kill` on the same port."""

    def __init__(self, folder, *options, is_tls=False):
        self.port = free_port()
        ports = ["--port", "0", "--tls-port"] if is_tls else ["--port"]
        self._command = [
            REDIS_SERVER, *ports, str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--appendonly", "no", "--dir", str(folder), *options,
        ]  # fmt: skip
        self._process = None

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(self._listens)

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self):
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    def address(self, **parts):
        return RedisAddress("127.0.0.1", self.port, **parts)

    def admin(self, **options):
        """A patient client; use it in a `with`."""
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0), protocol=2, **options)

    def _listens(self):
        assert self._process.poll() is None, "redis-server ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class Counted:
    """A cache and what its metrics say."""

    def __init__(self, cache, registry, remote=None):
        self.cache = cache
        self.registry = registry
        self.remote = remote

    def count(self, name, **labels):
        value = self.registry.get_sample_value(f"refinery_cache_{name}", labels)
        assert value is not None, f"there is no metric {name} {labels}"
        return value

    def lookups(self, result, tier="redis"):
        return self.count("lookups_total", tier=tier, result=result)

    def errors(self):
        """Of every kind together."""
        kinds = ("timeout", "connection", "corrupt", "full", "other")
        return sum(self.count("errors_total", kind=kind) for kind in kinds)


def make_cache(address, *, memory_bytes=0, max_value_bytes=16 * MIB, **options):
    """A cache with patient timeouts, as this machine may be busy, unless `options` name others."""
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    patient = {"connect_seconds": 2.0, "read_seconds": 2.0, "ttl_seconds": 1000}
    remote = RedisCache(address, metrics, max_value_bytes=max_value_bytes, **(patient | options))
    memory = MemoryCache(memory_bytes, metrics) if memory_bytes else None
    cache = FeatureCache(metrics, memory=memory, remote=remote, max_value_bytes=max_value_bytes)
    return Counted(cache, registry, remote)
