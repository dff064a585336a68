"""One computation for all who want the same thing at the same time (single-flight).

A flight belongs to nobody in particular: it goes on as long as anybody has joined it, whoever
began it, and is cancelled when the last one leaves.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Flight(Generic[T]):
    """A computation and those who wait for it. Whoever has joined must leave once.

    Attributes:
        task: The computation. Wait for it with `asyncio.wait`, which leaves it running when the
            one who waits is cancelled.
    """

    def __init__(self, work: Coroutine[Any, Any, T], on_done: Callable[[], None]) -> None:
        """
        Args:
            work: The computation, begun at once.
            on_done: Called when it is over, also when it was cancelled before its first step.
        """
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(_look_at)
        self.task.add_done_callback(lambda _: on_done())
        self._members = 1

    @property
    def is_cancelled(self) -> bool:
        """Whether everybody has left; its task may take some steps more to end."""
        return self._members == 0

    def join(self) -> None:
        """Be one more who wants the result."""
        self._members += 1

    def leave(self) -> None:
        """Want the result no more, or have it."""
        self._members -= 1
        if self._members == 0:
            self.task.cancel()


class Flights(Generic[T]):
    """Flights in progress, by key; for one event loop."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def __contains__(self, key: str) -> bool:
        """Whether there is a flight to join; one that everybody has left is none."""
        flight = self._flights.get(key)
        return flight is not None and not flight.is_cancelled

    def join(self, key: str) -> Flight[T] | None:
        """Join the flight of that key, if there is one."""
        if key not in self:
            return None
        flight = self._flights[key]
        flight.join()
        return flight

    def begin(
        self, key: str, work: Coroutine[Any, Any, T], on_done: Callable[[], None]
    ) -> Flight[T]:
        """Begin a flight that others can join; the caller has joined it."""
        flight = Flight(work, on_done)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda _: self._forget(key, flight))
        return flight

    def _forget(self, key: str, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def _look_at(task: "asyncio.Future[Any]") -> None:
    # Everybody may have left before the work failed: that is no error of the program.
    if not task.cancelled():
        task.exception()
