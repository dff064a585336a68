import asyncio

import pytest

from service.room import ByteRoom


class Holder:
    """Somebody who wants room, and gives it back when told."""

    def __init__(self, room, num_bytes):
        self.has_room = False
        self.done = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(room, num_bytes))

    async def _hold(self, room, num_bytes):
        async with room.hold(num_bytes):
            self.has_room = True
            await self.done.wait()
        self.has_room = False


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_finds_no_room_waits_in_order_of_arrival():
    async def use():
        room = ByteRoom(10)
        first, second, third = (Holder(room, num_bytes) for num_bytes in (6, 5, 1))
        await settle()
        assert (first.has_room, second.has_room, third.has_room) == (True, False, False)

        first.done.set()
        await settle()

        assert (second.has_room, third.has_room) == (True, True)

    asyncio.run(use())


def test_what_is_larger_than_all_the_room_gets_all_of_it():
    async def use():
        room = ByteRoom(10)
        large, small = Holder(room, 99), Holder(room, 1)
        await settle()
        assert (large.has_room, small.has_room) == (True, False)

        large.done.set()
        await settle()

        assert small.has_room

    asyncio.run(use())


@pytest.mark.parametrize("is_its_turn", [False, True])
def test_who_stops_waiting_keeps_nobody_waiting(is_its_turn):
    async def use():
        room = ByteRoom(10)
        first, second, third = (Holder(room, num_bytes) for num_bytes in (6, 5, 10))
        await settle()
        if is_its_turn:
            first.done.set()
            await asyncio.sleep(0)

        second.task.cancel()
        first.done.set()
        await settle()

        assert third.has_room
        assert not second.has_room

    asyncio.run(use())
