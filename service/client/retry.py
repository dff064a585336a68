"""When a failed try is made again: jittered back-off, `Retry-After`, never past the deadline."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.client.errors import DeadlineError, FeatureError

FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 8.0
# A service that asks to come back later than this is not waited for: the caller should know.
LONGEST_RETRY_AFTER_SECONDS = 60.0


class Deadline:
    """The moment by which a call must be over; without seconds there is none."""

    def __init__(
        self, seconds: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"deadline_seconds is {seconds}; give more than 0, or None")
        self._clock = clock
        self._seconds = seconds
        self._ends_at = None if seconds is None else clock() + seconds

    @property
    def remaining_seconds(self) -> float | None:
        """What is left, at least 0; None without a deadline."""
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    def check(self) -> None:
        """
        Raises:
            DeadlineError: it has passed.
        """
        if self.remaining_seconds == 0.0:
            raise self.error()

    def error(self) -> DeadlineError:
        """The error of a call that this deadline ended."""
        return DeadlineError(
            f"no answer within {self._seconds} s; give more time, or ask for less at once",
            code="client_deadline",
        )


@dataclass(slots=True)
class Tries:
    """Counts the tries of one request and says how long to wait before the next.

    Args:
        max_retries: Tries after the first.
        deadline: Of the call.
        draw: A number in [0, 1), for the jitter.
    """

    max_retries: int
    deadline: Deadline
    draw: Callable[[], float] = random.random
    _num_failed: int = field(default=0, init=False)

    def delay_after(self, error: FeatureError) -> float | None:
        """Seconds until the next try; None when `error` is the last word."""
        self._num_failed += 1
        if not error.retryable or self._num_failed > self.max_retries:
            return None
        asked = error.retry_after_seconds or 0.0
        if asked > LONGEST_RETRY_AFTER_SECONDS:
            return None
        backoff = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** (self._num_failed - 1))
        # Clients that were refused together must not come back together.
        delay = asked + backoff * (0.5 + 0.5 * self.draw())
        remaining = self.deadline.remaining_seconds
        return delay if remaining is None or delay < remaining else None
