"""Redis servers and caches that go away with the test."""

import asyncio
from contextlib import ExitStack

import pytest

from tests.service.cache.helpers import REDIS_SERVER, RedisServer, make_cache


def pytest_collection_modifyitems(items):
    if REDIS_SERVER is None:
        skip = pytest.mark.skip(reason="no redis-server is installed (Debian: redis-server)")
        for item in items:
            if "redis" in item.keywords and "cache" in item.path.parts:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """Say loudly when nothing ran against a Redis: skips are easy to overlook."""
    skipped = sum(
        "redis" in report.keywords for report in terminalreporter.stats.get("skipped", [])
    )
    if skipped:
        terminalreporter.section("Redis tests did NOT run", yellow=True, bold=True)
        terminalreporter.line(
            f"{skipped} tests need the binary redis-server and there is none "
            "(apt-get install redis-server), or one built with TLS and openssl."
        )


@pytest.fixture
def make_server(tmp_path):
    """A function that starts a redis-server with the options given."""
    with ExitStack() as stack:

        def make(*options):
            server = RedisServer(tmp_path, *options)
            stack.callback(server.kill)
            server.start()
            return server

        yield make


@pytest.fixture
def server(make_server):
    return make_server()


@pytest.fixture
def open_cache():
    """A function that starts a cache; see `make_cache` for its arguments."""
    with ExitStack() as stack:

        def open_one(address, **options):
            counted = make_cache(address, **options)
            counted.cache.start()
            stack.callback(lambda: asyncio.run(counted.cache.close(0.5)))
            return counted

        yield open_one
