"""A bound on the bytes that are held at a time: who finds no room waits, in order of arrival."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class ByteRoom:
    """Room for so many bytes; for one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait for room and keep it; what is larger than all the room gets all of it."""
        wanted = min(num_bytes, self._max_bytes)
        if self._waiting or wanted > self._free_bytes:
            await self._wait(wanted)
        else:
            self._free_bytes -= wanted
        try:
            yield
        finally:
            self._free_bytes += wanted
            self._admit()

    async def _wait(self, wanted: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came in the same moment
                self._free_bytes += wanted
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if wanted > self._free_bytes:
                    return
                self._free_bytes -= wanted
                turn.set_result(None)
            self._waiting.popleft()
