"""Commands of a sweep as processes: signals that reach them, and why they failed."""

import os
import signal
import sys

import pytest

from trainer.ablate.children import Children, reason_of
from trainer.ablate.sweep import only_one


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """What starts the tests may ignore some, as nohup and a shell's background jobs do."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in kinds}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Children() as children:
        os.kill(os.getpid(), signal.SIGHUP)
        ended = children.run([sys.executable, "-S", "-c", ""], tmp_path / "log")

    assert (ended, children.signum) == (0, None)


def test_a_child_keeps_the_folder_when_the_sweep_is_gone(tmp_path):
    with only_one(tmp_path / "out") as lock:
        code = "import fcntl, sys; fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        command = [sys.executable, "-S", "-c", code, str(lock.fileno())]

        # Only on the very same open file is a lock that is held no obstacle.
        assert Children([lock]).run(command, tmp_path / "log") == 0
        assert Children().run(command, tmp_path / "log") != 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_waited_for(tmp_path, signum):
    code = """
import os, signal, sys, time
seen = []
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, lambda number, frame: seen.append(number))
os.kill(os.getppid(), int(sys.argv[1]))
end = time.monotonic() + 60
while not seen and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.1)
print(seen, flush=True)
sys.exit(75)
"""
    before = signal.getsignal(signum)
    with Children() as children:
        ended = children.run([sys.executable, "-S", "-c", code, str(int(signum))], tmp_path / "log")

    assert (ended, children.signum) == (75, signum)
    assert f"[{int(signum)}]" in (tmp_path / "log").read_text()
    assert signal.getsignal(signum) == before


def test_a_closed_terminal_lets_the_child_write_its_checkpoint(tmp_path):
    with Children() as children:
        os.kill(os.getpid(), signal.SIGHUP)
        command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]

        # The trainer takes SIGTERM for a request to stop; SIGHUP would end it at once.
        assert children.run(command, tmp_path / "log") == -signal.SIGTERM
        assert children.signum == signal.SIGHUP


def test_a_signal_between_two_children_reaches_the_next_one(tmp_path):
    with Children() as children:
        os.kill(os.getpid(), signal.SIGTERM)
        command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]

        assert children.run(command, tmp_path / "log") == -signal.SIGTERM


def test_the_reason_is_the_last_error_of_the_last_command(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n$ first\nerror: old\n\n$ second\nerror: new\nbye\n")

    assert reason_of(2, log) == "exit code 2: error: new"
    log.write_text("\n$ first\nhello\nbye\n")
    assert reason_of(1, log) == "exit code 1: bye"
    assert reason_of(-9, log) == "killed by SIGKILL"
    assert reason_of(1, tmp_path / "missing") == "exit code 1"
