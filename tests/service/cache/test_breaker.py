import logging

import pytest
from prometheus_client import CollectorRegistry

from service.cache import CacheMetrics
from service.cache.breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def breaker(clock, registry):
    return CircuitBreaker("here:1/0", CacheMetrics(registry), clock=clock)


def fail(breaker, times=1):
    for _ in range(times):
        breaker.begin().fail(OSError("planted"))


def test_five_failures_open_it_and_four_do_not(breaker, registry):
    fail(breaker, 4)
    assert not breaker.is_open

    fail(breaker)

    assert breaker.is_open
    assert breaker.begin() is None
    assert registry.get_sample_value("refinery_cache_breaker_open") == 1


def test_failures_spread_over_more_than_ten_seconds_do_not_open_it(breaker, clock):
    for _ in range(20):
        fail(breaker)
        clock.now += 2.6

    assert not breaker.is_open


def test_successes_in_between_do_not_excuse_failures(breaker):
    for _ in range(5):
        breaker.begin().succeed()
        fail(breaker)

    assert breaker.is_open


def test_after_a_second_one_probe_at_a_time_may_try(breaker, clock):
    fail(breaker, 5)
    clock.now = 0.99
    assert breaker.is_blocking

    clock.now = 1.0
    assert not breaker.is_blocking
    probe = breaker.begin()

    assert probe.is_probe
    assert breaker.is_blocking
    assert breaker.begin() is None


def test_a_probe_that_works_closes_it(breaker, clock, registry):
    fail(breaker, 5)
    clock.now = 1.0

    breaker.begin().succeed()

    assert not breaker.is_open
    assert not breaker.begin().is_probe
    assert registry.get_sample_value("refinery_cache_breaker_open") == 0


def test_a_closed_one_needs_five_new_failures(breaker, clock):
    fail(breaker, 5)
    clock.now = 1.0
    breaker.begin().succeed()

    fail(breaker, 4)

    assert not breaker.is_open


def test_a_probe_that_fails_waits_another_second(breaker, clock):
    fail(breaker, 5)
    clock.now = 1.0

    fail(breaker)

    clock.now = 1.99
    assert breaker.begin() is None
    clock.now = 2.0
    assert breaker.begin().is_probe


def test_a_probe_that_was_never_made_leaves_room_for_the_next(breaker, clock):
    fail(breaker, 5)
    clock.now = 1.0

    breaker.begin().abandon()

    assert breaker.begin().is_probe


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
def test_an_attempt_from_before_it_opened_changes_nothing(breaker, clock, outcome):
    early = breaker.begin()
    fail(breaker, 5)
    clock.now = 1.0
    probe = breaker.begin()

    early.fail(OSError()) if outcome == "fail" else early.succeed()

    assert breaker.is_open
    assert breaker.begin() is None
    probe.succeed()
    assert not breaker.is_open


def test_only_the_first_outcome_of_an_attempt_counts(breaker):
    attempt = breaker.begin()

    assert attempt.fail(OSError())
    assert not attempt.fail(OSError())
    assert not attempt.succeed()
    assert not attempt.abandon()

    fail(breaker, 3)
    assert not breaker.is_open


def test_it_logs_that_it_opens_and_closes_and_nothing_else(breaker, clock, caplog):
    caplog.set_level(logging.DEBUG)
    fail(breaker, 5)
    for second in range(1, 5):
        clock.now = float(second)
        fail(breaker)
    clock.now = 5.0
    breaker.begin().succeed()

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "here:1/0 failed 5 times" in caplog.records[0].message
    assert "OSError: planted" in caplog.records[0].message
    assert "answers again" in caplog.records[1].message
