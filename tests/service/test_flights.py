import asyncio
import gc

import pytest

from service.flights import Flight, Flights


class Work:
    """A computation that a test ends, and what became of it."""

    def __init__(self, result="map", error=None):
        self.gate = asyncio.Event()
        self.num_begun = self.num_cancelled = self.num_ends = 0
        self._result, self._error = result, error

    async def run(self):
        self.num_begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self._error:
            raise self._error
        return self._result

    def on_done(self):
        self.num_ends += 1


def in_loop(test):
    """Run an async test in a loop of its own, where no error may be left unread."""

    def run():
        complaints = []

        async def watched():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            await test()
            gc.collect(1)

        asyncio.run(watched())
        assert complaints == []

    run.__name__ = test.__name__
    return run


async def some_steps(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


@in_loop
async def test_all_who_join_share_one_computation():
    flights, work = Flights(), Work()
    first = flights.begin("a", work.run(), work.on_done)

    second = flights.join("a")
    work.gate.set()

    assert second is first
    assert await second.task == "map"
    assert (work.num_begun, work.num_ends) == (1, 1)


@in_loop
async def test_there_is_nothing_to_join_under_another_key():
    flights, work = Flights(), Work()
    flight = flights.begin("a", work.run(), work.on_done)

    assert "a" in flights
    assert "b" not in flights
    assert flights.join("b") is None
    flight.leave()
    await asyncio.wait([flight.task])


@in_loop
async def test_whoever_began_may_leave_and_the_others_still_get_the_result():
    flights, work = Flights(), Work()
    flight = flights.begin("a", work.run(), work.on_done)
    other = flights.join("a")
    await some_steps()

    flight.leave()
    await some_steps()
    work.gate.set()

    assert await other.task == "map"
    assert work.num_cancelled == 0


@in_loop
async def test_waiting_for_a_flight_can_be_cancelled_without_ending_it():
    flights, work = Flights(), Work()
    flight = flights.begin("a", work.run(), work.on_done)
    flights.join("a")
    waiting = asyncio.ensure_future(asyncio.wait([flight.task]))
    await some_steps()

    waiting.cancel()
    await some_steps()

    assert not flight.task.done()
    work.gate.set()
    assert await flight.task == "map"


@in_loop
async def test_the_last_one_to_leave_cancels_the_computation():
    flights, work = Flights(), Work()
    flight = flights.begin("a", work.run(), work.on_done)
    flights.join("a")
    await some_steps()

    flight.leave()
    flight.leave()
    await asyncio.wait([flight.task])
    await some_steps()

    assert (work.num_cancelled, work.num_ends) == (1, 1)
    assert "a" not in flights


@in_loop
async def test_its_end_is_told_also_when_it_is_cancelled_before_its_first_step():
    flights, work = Flights(), Work()

    flights.begin("a", work.run(), work.on_done).leave()
    await some_steps()

    assert (work.num_begun, work.num_ends) == (0, 1)
    assert "a" not in flights


@in_loop
async def test_a_flight_that_all_have_left_is_not_joined_while_it_ends():
    flights, work, again = Flights(), Work(), Work("again")
    flight = flights.begin("a", work.run(), work.on_done)
    await some_steps()

    flight.leave()  # its task has not heard of it yet
    assert "a" not in flights
    assert flights.join("a") is None
    second = flights.begin("a", again.run(), again.on_done)
    await some_steps()

    assert flight.task.cancelled()
    assert "a" in flights, "the end of the first flight must not hide the second"
    again.gate.set()
    assert await second.task == "again"
    assert (work.num_ends, again.num_ends) == (1, 1)


@in_loop
async def test_a_result_that_is_there_already_can_be_left_behind():
    flights, work = Flights(), Work()
    flight = flights.begin("a", work.run(), work.on_done)
    work.gate.set()
    await flight.task

    flight.leave()
    await some_steps()

    assert flight.task.result() == "map"
    assert work.num_ends == 1


@in_loop
async def test_a_new_flight_of_the_same_key_begins_after_the_old_one():
    flights, work, again = Flights(), Work(), Work("again")
    flight = flights.begin("a", work.run(), work.on_done)
    work.gate.set()
    await flight.task
    await some_steps()

    assert flights.join("a") is None
    second = flights.begin("a", again.run(), again.on_done)
    again.gate.set()

    assert await second.task == "again"


@in_loop
async def test_everybody_who_joined_hears_of_a_failure():
    flights, work = Flights(), Work(error=ValueError("planted failure"))
    flight = flights.begin("a", work.run(), work.on_done)
    other = flights.join("a")
    work.gate.set()
    await asyncio.wait([flight.task])

    for member in (flight, other):
        with pytest.raises(ValueError, match="planted"):
            member.task.result()
        member.leave()
    await some_steps()
    assert work.num_ends == 1


@in_loop
async def test_a_failure_that_nobody_waits_for_is_no_error_of_the_program():
    async def fail_when_cancelled():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("planted failure") from None

    work = Work()
    flight = Flight(fail_when_cancelled(), work.on_done)
    await some_steps()

    flight.leave()
    del flight
    await some_steps()

    assert work.num_ends == 1
