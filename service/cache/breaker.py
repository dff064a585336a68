"""A circuit breaker: a server that keeps failing is left alone until one probe of it works."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from service.cache.metrics import CacheMetrics

logger = logging.getLogger(__name__)

Outcome = Literal["success", "failure", "unknown"]


class Attempt:
    """One exchange with the server; the first of its outcomes counts."""

    def __init__(self, breaker: "CircuitBreaker", *, is_probe: bool) -> None:
        self.is_probe = is_probe
        self._breaker = breaker
        self.is_settled = False

    def succeed(self) -> bool:
        """It worked. Returns whether this is its first outcome."""
        return self._breaker.settle(self, "success")

    def fail(self, error: Exception) -> bool:
        """It did not. Returns whether this is its first outcome."""
        return self._breaker.settle(self, "failure", error)

    def abandon(self) -> bool:
        """It was never made. Returns whether this is its first outcome."""
        return self._breaker.settle(self, "unknown")


class CircuitBreaker:
    """Closed: all may try. Open: none. Half open: one at a time; safe to use from any thread.

    It opens after `max_failures` in `window_seconds`, lets a probe through every `probe_seconds`,
    and closes when one works. Each change is logged, once.
    """

    def __init__(
        self,
        server: str,
        metrics: CacheMetrics,
        *,
        max_failures: int = 5,
        window_seconds: float = 10.0,
        probe_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._metrics = metrics
        self._max_failures = max_failures
        self._window_seconds = window_seconds
        self._probe_seconds = probe_seconds
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=max_failures)
        self._next_probe: float | None = None  # None: closed
        self._is_probing = False
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._next_probe is not None

    @property
    def is_blocking(self) -> bool:
        """Whether `begin` would say no just now."""
        with self._lock:
            return self._blocks()

    def begin(self) -> Attempt | None:
        """Leave to try, of which the outcome must be told; None while the server is left alone."""
        with self._lock:
            if self._blocks():
                return None
            self._is_probing = is_probe = self.is_open
            return Attempt(self, is_probe=is_probe)

    def settle(self, attempt: Attempt, outcome: Outcome, error: Exception | None = None) -> bool:
        """Take the outcome of an attempt; see `Attempt`."""
        with self._lock:
            if attempt.is_settled:
                return False
            attempt.is_settled = True
            if attempt.is_probe:
                self._is_probing = False
                if outcome == "success":
                    self._close()
                elif outcome == "failure":
                    self._next_probe = self._clock() + self._probe_seconds
            elif outcome == "failure" and not self.is_open:
                # One that began before it opened says nothing new.
                self._count_failure(error)
            return True

    def _blocks(self) -> bool:
        return self._next_probe is not None and (
            self._is_probing or self._clock() < self._next_probe
        )

    def _count_failure(self, error: Exception | None) -> None:
        now = self._clock()
        self._failures.append(now)
        if (
            len(self._failures) == self._max_failures
            and now - self._failures[0] <= self._window_seconds
        ):
            self._next_probe = now + self._probe_seconds
            self._metrics.breaker_open.set(1)
            logger.warning(
                "redis %s failed %d times in %.0f s and is left alone but for a probe every "
                "%.0f s; requests go on without it; the last failure: %s: %s",
                self._server,
                self._max_failures,
                self._window_seconds,
                self._probe_seconds,
                type(error).__name__,
                error,
            )

    def _close(self) -> None:
        self._next_probe = None
        self._failures.clear()
        self._metrics.breaker_open.set(0)
        logger.info("redis %s answers again and is used", self._server)
