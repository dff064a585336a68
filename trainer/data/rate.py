"""Whether the loader keeps up with the steps."""

import logging
from collections import deque

from trainer.data.loader import Batches

logger = logging.getLogger(__name__)

_WINDOW = 50  # optimiser steps
_MAX_WAIT = 0.1  # share of their time


class LoaderWatch:
    """Compares what the loader could give with what the steps take, and says once if it starves.

    Args:
        stream: Where the steps' images come from.
        images_per_step: Images that an optimiser step takes of it.
    """

    def __init__(self, stream: Batches, *, images_per_step: int) -> None:
        self._stream = stream
        self._images_per_step = images_per_step
        self._waited = stream.wait_seconds
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._has_warned = False

    def step(self, seconds: float) -> dict[str, float]:
        """Note an optimiser step that took `seconds` with its waiting.

        Returns:
            `data_wait_seconds` of the step; `loader_rate`, images per second that the loader could
            give; `loader_over_step`, the same over what a step that never waits would take.
        """
        wait = self._stream.wait_seconds - self._waited
        self._waited = self._stream.wait_seconds
        self._steps.append((wait, seconds))
        rate = self._stream.loader_rate
        step_rate = self._images_per_step / max(seconds - wait, 1e-9)
        self._warn(rate, step_rate)
        return {
            "data_wait_seconds": wait,
            "loader_rate": rate,
            "loader_over_step": rate / step_rate,
        }

    def _warn(self, rate: float, step_rate: float) -> None:
        wait, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        if self._has_warned or len(self._steps) < _WINDOW or wait <= _MAX_WAIT * seconds:
            return
        self._has_warned = True
        logger.warning(
            "the last %d steps waited for images %.0f %% of their time: the loader gives %.0f "
            "images/s, and a step could take %.0f; raise data.workers if cores are idle, use "
            "smaller files, or set data.resize=device",
            _WINDOW,
            100 * wait / seconds,
            rate,
            step_rate,
        )
