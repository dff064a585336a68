import pytest

from service.cores import Cores


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_work_that_is_alone_gets_all_threads_and_more_at_a_time_share_them(clock):
    cores = Cores(8, clock)

    assert [cores.enter() for _ in range(5)] == [8, 4, 2, 2, 1]


def test_who_is_alone_for_a_moment_goes_on_sharing(clock):
    cores = Cores(8, clock)
    cores.enter()
    cores.enter()
    cores.leave()
    cores.leave()

    clock.now = 0.4
    between_two_batches = cores.enter()
    cores.leave()
    clock.now = 1.0

    assert between_two_batches == 4
    assert cores.enter() == 8
    assert cores.num_busy == 1


def test_there_is_always_one_thread(clock):
    cores = Cores(1, clock)

    assert [cores.enter() for _ in range(3)] == [1, 1, 1]
