"""Pauses between tries."""

import pytest

from service.client import DeadlineError, FeatureError
from service.client.errors import from_answer
from service.client.retry import Deadline, Tries


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def failure(*, retryable=True, after=None):
    return FeatureError("x", code="x", retryable=retryable, retry_after_seconds=after)


def tries(max_retries=20, deadline=None, draw=1.0):
    return Tries(max_retries, deadline or Deadline(None), draw=lambda: draw)


def test_pauses_double_up_to_a_bound():
    counted = tries()

    delays = [counted.delay_after(failure()) for _ in range(8)]

    assert delays == [0.25, 0.5, 1, 2, 4, 8, 8, 8]


def test_jitter_takes_up_to_half_of_a_pause():
    assert tries(draw=0.0).delay_after(failure()) == 0.125


def test_retry_after_comes_before_the_pause():
    assert tries(draw=1.0).delay_after(failure(after=3.0)) == 3.25


def test_a_service_that_asks_for_hours_is_not_waited_for():
    assert tries().delay_after(failure(after=3600.0)) is None


def test_tries_end():
    counted = tries(max_retries=2)

    assert [counted.delay_after(failure()) is None for _ in range(3)] == [False, False, True]


def test_what_cannot_pass_is_not_tried_again():
    assert tries().delay_after(failure(retryable=False)) is None


def test_a_pause_never_passes_the_deadline():
    clock = Clock()
    counted = tries(deadline=Deadline(1.0, clock=clock))

    assert counted.delay_after(failure()) == 0.25
    clock.now += 0.6

    assert counted.delay_after(failure()) is None


def test_a_deadline_says_what_is_left():
    clock = Clock()
    deadline = Deadline(2.0, clock=clock)
    deadline.check()
    clock.now += 1.5
    assert deadline.remaining_seconds == 0.5
    clock.now += 1

    assert deadline.remaining_seconds == 0
    with pytest.raises(DeadlineError, match=r"2\.0 s"):
        deadline.check()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        (None, None),
        ("soon", None),
        ("-1", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after_is_read(value, seconds):
    headers = {} if value is None else {"retry-after": value}

    error = from_answer(429, headers, b"")

    assert error.retry_after_seconds == seconds
