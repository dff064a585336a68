"""How far an evaluation is: a bar on a terminal's stderr, log lines elsewhere.

with progress.stage("encode raw", total=701, done=300) as advance:
    for batch in batches:
        ...
        advance(len(batch))
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich import progress as rich_progress
from rich.console import Console

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0

# Is told how many more are done.
Advance = Callable[[int], None]


class Progress:
    """Shows stages, one after the other.

    Args:
        console: Where a bar is drawn, if it is a terminal; log lines if not. None: neither.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """A stage of `total` steps, of which `done` were done before."""
        if self._console is None:
            yield lambda _: None
        elif self._console.is_terminal:
            with _bar(self._console) as bar:
                task = bar.add_task(title, total=total, completed=done)
                yield lambda count: bar.advance(task, count)
        else:
            yield _LogLines(title, total, done)


SILENT = Progress()


@cache
def stderr_console() -> Console:
    """The one console of stderr: log lines that go through it stand above the bar."""
    return Console(stderr=True)


def _bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )


class _LogLines:
    """A line when some seconds have passed since the last one, and one at the end."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._first = done
        self._started = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._told < _LOG_SECONDS:
            return
        self._told = now
        seconds = now - self._started
        left = seconds * (self._total - self._done) / max(1, self._done - self._first)
        logger.info(
            "%s: %d of %d in %.0f s, %.0f s left",
            self._title,
            self._done,
            self._total,
            seconds,
            left,
        )
