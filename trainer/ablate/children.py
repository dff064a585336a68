"""Runs commands one after the other, and hands signals on to the one that runs."""

import shlex
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Protocol, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROMPT = "$ "
_MAX_REASON = 300


class Runner(Protocol):
    """What carries out the commands of a sweep.

    Attributes:
        signum: The signal that asked to stop; None while there was none.
    """

    @property
    def signum(self) -> int | None: ...

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end, what it says behind what is in `log`; returns its exit code."""
        ...


class Children:
    """A `Runner` of processes; a context in which SIGTERM, Ctrl-C and SIGHUP go to the child.

    The trainer ends a step and writes a checkpoint at the first one, and dies at the second. Of a
    terminal that closes it knows nothing: SIGHUP goes on as SIGTERM.

    Args:
        held: Open files that a child holds too: a lock on them lasts as long as it does, even
            where this process was killed and could not end it.
    """

    def __init__(self, held: Sequence[IO[str]] = ()) -> None:
        self.signum: int | None = None
        self._held = [file.fileno() for file in held]
        self._pending: deque[int] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, signal.Handlers | None] = {}

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            # What runs under nohup ignores SIGHUP, and shall go on doing so.
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._hand_on)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def run(self, command: Sequence[str], log: Path) -> int:
        """See `Runner`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            _write_line(file, _PROMPT + shlex.join(command))
            # A session of its own: a terminal's Ctrl-C must reach the child once, from here.
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self._held,
            ) as process:
                self._process = process
                self._deliver()  # what came before there was a child
                try:
                    return process.wait()
                finally:
                    self._process = None

    def _hand_on(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self._pending.append(signum)
        self._deliver()

    def _deliver(self) -> None:
        """Send each signal once; a handler may come in between."""
        while self._process is not None:
            try:
                signum = self._pending.popleft()
            except IndexError:
                return
            self._process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)


def reason_of(code: int, log: Path) -> str:
    """Why a command failed, in one line: the last error in its log, else its last line."""
    end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return end
    lines = [line.strip() for line in text.rpartition(f"\n{_PROMPT}")[2].splitlines()[1:]]
    lines = [line for line in lines if line]
    errors = [line for line in lines if "error" in line.lower()]
    if not lines or code < 0:
        return end
    told = (errors or lines)[-1]
    told = told if len(told) <= _MAX_REASON else told[: _MAX_REASON - 3] + "..."
    return f"{end}: {told}"


def _write_line(file: IO[bytes], text: str) -> None:
    file.write(f"\n{text}\n".encode())
    file.flush()
