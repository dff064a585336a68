import threading

import pytest

from service.admission import Admission, HeldBodies
from service.errors import OverloadedError
from service.metrics import Metrics


def make_admission(metrics=None, **changes):
    defaults = {"queue_seconds": 2.0, "max_tokens": 0, "min_tokens": 100, "num_devices": 1}
    return Admission(metrics or Metrics(), **(defaults | changes))


def refuse(admission, tokens):
    """The error that asking for so many tokens must give."""
    with pytest.raises(OverloadedError) as caught:
        admission.admit(tokens)
    return caught.value


def test_work_is_admitted_up_to_the_bound():
    admission = make_admission()

    admission.admit(60)
    admission.admit(40)

    assert admission.tokens == 100
    refuse(admission, 1)


def test_a_request_that_is_refused_takes_nothing():
    metrics = Metrics()
    admission = make_admission(metrics)
    admission.admit(60)

    refuse(admission, 50)

    assert admission.tokens == 60
    assert metrics.rejected_tokens._value.get() == 50
    admission.admit(40)


def test_what_is_released_can_be_admitted_again():
    metrics = Metrics()
    admission = make_admission(metrics)
    admission.admit(60)
    admission.admit(40)

    admission.release(40)
    admission.admit(30)

    assert admission.tokens == metrics.admitted_tokens._value.get() == 90


def test_a_request_beyond_the_bound_passes_when_nothing_is_there_and_then_alone():
    admission = make_admission()

    admission.admit(1000)

    refuse(admission, 1)
    admission.release(1000)
    admission.admit(1)
    refuse(admission, 1000)


def test_before_anything_was_measured_the_least_bound_holds():
    admission = make_admission()

    assert (admission.tokens_per_second, admission.limit) == (0.0, 100)
    admission.admit(100)
    assert refuse(admission, 1).headers == {"retry-after": "1"}


def test_the_bound_is_a_time_at_the_measured_rate_of_all_engines():
    admission = make_admission(num_devices=3)

    admission.observe(1000, 2.0)

    assert admission.tokens_per_second == 1500.0
    assert admission.limit == 3000


def test_the_bound_never_falls_below_the_least():
    admission = make_admission()

    admission.observe(1, 1.0)

    assert admission.limit == 100


def test_a_bound_in_tokens_holds_whatever_was_measured():
    admission = make_admission(max_tokens=10)

    admission.observe(1_000_000, 1.0)

    assert admission.limit == 10


def test_the_rate_is_a_running_mean_of_batches():
    metrics = Metrics()
    admission = make_admission(metrics)

    admission.observe(100, 1.0)
    admission.observe(200, 1.0)

    assert admission.tokens_per_second == pytest.approx(120.0)
    admission.observe(120, 1.0)
    assert metrics.tokens_per_second._value.get() == pytest.approx(120.0)
    for _ in range(100):
        admission.observe(500, 1.0)
    assert admission.tokens_per_second == pytest.approx(500.0)


def test_a_batch_that_took_no_measurable_time_is_a_finite_rate():
    admission = make_admission()

    admission.observe(100, 0.0)

    assert admission.limit == 200_000_000


def test_the_warm_up_gives_the_first_rate_and_no_later_one():
    metrics = Metrics()
    admission = make_admission(metrics)

    admission.start_at(400.0)
    admission.start_at(900.0)  # of a second model

    assert admission.tokens_per_second == metrics.tokens_per_second._value.get() == 400.0
    admission.observe(900, 1.0)
    assert admission.tokens_per_second == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("rate", "tokens", "seconds"),
    [(10.0, 25, 3), (1000.0, 25, 1), (1e-9, 25, 60), (10.0, 5000, 10)],
    ids=["rounded up", "at least a second", "at most a minute", "until nothing is there"],
)
def test_retry_after_is_the_time_until_there_is_room(rate, tokens, seconds):
    admission = make_admission(max_tokens=100)
    admission.start_at(rate)
    admission.admit(100)

    error = refuse(admission, tokens)

    assert error.headers == {"retry-after": str(seconds)}
    assert error.retryable
    assert f"needs {tokens}, and 100 are allowed; retry in {seconds} s" in error.message


def test_engines_may_observe_from_several_threads():
    admission = make_admission()
    admission.start_at(100.0)

    def observe():
        for _ in range(1000):
            admission.observe(100, 1.0)

    engines = [threading.Thread(target=observe) for _ in range(4)]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join()

    assert admission.tokens_per_second == pytest.approx(100.0)


def test_what_cannot_be_done_by_its_deadline_is_refused_at_once():
    admission = make_admission(queue_seconds=100.0)
    admission.start_at(50.0)
    admission.admit(100)  # two seconds of work

    admission.admit(20, seconds_left=10.0)
    with pytest.raises(OverloadedError, match="and 100 can be done by its deadline; retry in 1 s"):
        admission.admit(20, seconds_left=2.0)

    assert admission.tokens == 120


def test_a_deadline_does_not_raise_the_bound():
    admission = make_admission(max_tokens=100)
    admission.start_at(1000.0)
    admission.admit(60)

    with pytest.raises(OverloadedError, match="and 100 are allowed"):
        admission.admit(60, seconds_left=50.0)


def test_bodies_are_held_until_their_block_ends_and_no_more_than_allowed():
    bodies = HeldBodies(10)

    with bodies.hold() as take, bodies.hold() as take_other:
        take(6)
        take_other(4)
        with pytest.raises(OverloadedError, match="take 6 bytes, 10 are allowed"):
            take_other(1)
        assert bodies.num_bytes == 10

    assert bodies.num_bytes == 0


def test_those_who_are_refused_later_are_told_to_come_back_later():
    admission = make_admission(max_tokens=100)
    admission.start_at(10.0)
    admission.admit(100)

    waits = [int(refuse(admission, 20).headers["retry-after"]) for _ in range(4)]
    admission.release(100)
    admission.admit(100)

    assert waits == [2, 4, 6, 8]
    assert int(refuse(admission, 20).headers["retry-after"]) == 2
