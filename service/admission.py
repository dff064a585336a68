"""How much work and how many bytes of bodies may wait.

Work is counted in patch tokens, for a whole request at once, before decoding. What is
admitted holds its tokens until it is encoded or given up. The bound is a time at the rate that the
engines were measured at, so a request that is admitted is also answered in about that time; one
that is not hears when to come back.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import OverloadedError
from service.metrics import Metrics

_RATE_WEIGHT = 0.2  # of the newest batch in the running mean
_MAX_RETRY_SECONDS = 60


class Admission:
    """Counts tokens; `observe` may be called from any thread, the rest from the event loop's."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        queue_seconds: float,
        max_tokens: int,
        min_tokens: int,
        num_devices: int,
    ) -> None:
        """
        Args:
            queue_seconds: Work that may wait, in seconds of the measured rate.
            max_tokens: The bound in tokens, which then holds instead; 0: by `queue_seconds`.
            min_tokens: Never a lower bound than this.
            num_devices: Devices that share the work.
        """
        self._metrics = metrics
        self._queue_seconds = queue_seconds
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._num_devices = num_devices
        self._lock = threading.Lock()
        self._device_rate = 0.0
        self._refused_tokens = 0  # lately: who was refused first will also come back first
        self.tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Running mean over all devices; 0 before anything was measured."""
        return self._device_rate * self._num_devices

    @property
    def limit(self) -> int:
        """Most tokens that may be admitted at a time."""
        if self._max_tokens:
            return self._max_tokens
        return max(self._min_tokens, int(self.tokens_per_second * self._queue_seconds))

    def start_at(self, tokens_per_second: float) -> None:
        """The rate of one device before it has encoded anything: what the warm-up measured."""
        with self._lock:
            self._device_rate = self._device_rate or tokens_per_second
        self._metrics.tokens_per_second.set(self.tokens_per_second)

    def observe(self, tokens: int, seconds: float) -> None:
        """A device has encoded `tokens` in `seconds`."""
        rate = tokens / max(seconds, 1e-6)
        with self._lock:
            old = self._device_rate
            self._device_rate = rate if old == 0.0 else old + _RATE_WEIGHT * (rate - old)
        self._metrics.tokens_per_second.set(self.tokens_per_second)

    def admit(self, tokens: int, *, seconds_left: float | None = None) -> None:
        """Take in work of so many tokens; give them back with `release`.

        A request that is larger than the bound is taken when nothing else is there: otherwise it
        never would be.

        Args:
            tokens: Of all images of a request that have to be encoded.
            seconds_left: Until the request's deadline. What cannot be done by then at the
                measured rate is refused now rather than given up then.

        Raises:
            OverloadedError: too much is there already.
        """
        limit, reason = self.limit, "are allowed"
        rate = self.tokens_per_second
        if seconds_left is not None and rate * seconds_left < limit and rate > 0.0:
            limit, reason = int(rate * seconds_left), "can be done by its deadline"
        if self.tokens > 0 and self.tokens + tokens > limit:
            # One that is larger than the bound waits until nothing else is there, and no longer.
            excess = min(self.tokens + tokens - limit, self.tokens) + self._refused_tokens
            self._refused_tokens += tokens
            seconds = excess / rate if rate else 1.0
            wait = min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)
            self._metrics.rejected_tokens.inc(tokens)
            raise OverloadedError(
                f"{self.tokens} tokens are waiting, the request needs {tokens}, and {limit} "
                f"{reason}; retry in {wait} s",
                retry_seconds=wait,
            )
        self._change(tokens)

    def release(self, tokens: int) -> None:
        """Work of so many tokens is done, or nobody wants it any more."""
        self._refused_tokens = max(0, self._refused_tokens - tokens)
        self._change(-tokens)

    def _change(self, tokens: int) -> None:
        self.tokens += tokens
        self._metrics.admitted_tokens.set(self.tokens)


class HeldBodies:
    """Counts the bytes of bodies in memory, also of those still arriving; for the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """What counts the bytes of one body as they come; they are gone when the block ends.

        Its `Raises`:
            OverloadedError: there would be too many.
        """
        own_bytes = 0

        def take(num_bytes: int) -> None:
            nonlocal own_bytes
            if self.num_bytes + num_bytes > self._max_bytes:
                raise OverloadedError(
                    f"the bodies of other requests take {self.num_bytes - own_bytes} bytes, "
                    f"{self._max_bytes} are allowed with this one; retry in 1 s"
                )
            own_bytes += num_bytes
            self.num_bytes += num_bytes

        try:
            yield take
        finally:
            self.num_bytes -= own_bytes
