"""Servers as processes of their own: the service, its peers, Redis."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import orjson
import psutil

from benchmarks.load import Target

_START_SECONDS = 180
_STOP_SECONDS = 60
_ANSWER_SECONDS = 60


class ServerProcess:
    """A server that was started; its children are of its process group."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        *,
        ready_path: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.url = url
        self._ready_path = ready_path
        self._process = subprocess.Popen(
            self.command, start_new_session=True, stdout=subprocess.DEVNULL, env=environment
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def target(self) -> Target:
        return Target.of(self.url + "/features")

    def wait_until_ready(self) -> None:
        """
        Raises:
            SystemExit: it ended, or is not ready in time.
        """
        wait_until(self._is_ready, f"{self.name} is not ready")

    def pause(self) -> None:
        """Stop it where it stands: an idle server may not be idle."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to end; only the server itself, as an orchestrator would."""
        self._process.terminate()

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it still runs after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it and its children, if need be by force."""
        if self.status is None:
            self.resume()
            self.terminate()
        if self.wait(_STOP_SECONDS) is None:
            sys.stderr.write(f"{self.name} did not end in {_STOP_SECONDS} s: it is killed\n")
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _is_ready(self) -> bool:
        if self.status is not None:
            raise SystemExit(f"{self.name} ended with status {self.status}")
        try:
            get(self.url + self._ready_path)
        except (URLError, OSError):
            return False
        return True


@contextmanager
def serving(
    model: str, *, precision: str, flags: Sequence[str] = (), module: str = "service"
) -> Iterator[ServerProcess]:
    """The service, once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", module, "--model", model, "--port", str(port)]
    command += ["--precision", precision, "--log-level", "error", *flags]
    with _started(
        ServerProcess("the service", command, f"http://127.0.0.1:{port}", ready_path="/readyz")
    ) as server:
        yield server


@contextmanager
def peer(
    name: str, model: str, *, precision: str, size: tuple[int, int], flags: Sequence[str] = ()
) -> Iterator[ServerProcess]:
    """A peer of `benchmarks.serving.peers_<name>`, once it is ready, as one would start it."""
    port = free_port()
    command = [sys.executable, "-m", f"benchmarks.serving.peers_{name}", "--model", model]
    command += ["--port", str(port), "--precision", precision]
    command += ["--size", str(size[0]), str(size[1]), *flags]
    url = f"http://127.0.0.1:{port}"
    # The setting of threads that the service makes for itself is not a peer's.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    with _started(
        ServerProcess(name, command, url, ready_path="/health", environment=environment)
    ) as server:
        yield server


class Redis:
    """A redis-server of our own on a free port, without persistence."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("redis-server") is not None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        command += ["--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, "redis-server does not answer")

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def redis() -> Iterator[Redis]:
    """A running Redis."""
    with tempfile.TemporaryDirectory() as folder:
        server = Redis(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


class CoreShare:
    """Cores that other programs than this one and its children take, from now on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def others(self) -> float:
        """Cores, on average since the start."""
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / (time.perf_counter() - self._started))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def get(url: str) -> str:
    """
    Raises:
        URLError: no answer, or one that is an error.
    """
    with urlopen(url, timeout=_ANSWER_SECONDS) as answer:
        content: bytes = answer.read()
    return content.decode()


def get_json(url: str) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(get(url))
    return document


def post(url: str, body: bytes, content_type: str = "image/jpeg") -> bytes:
    """The body of a good answer.

    Raises:
        SystemExit: any other answer; says what it was.
    """
    try:
        with urlopen(
            Request(url, body, {"content-type": content_type}), timeout=_ANSWER_SECONDS
        ) as answer:
            content: bytes = answer.read()
    except HTTPError as error:
        raise SystemExit(f"{url} answers {error.code}: {error.read()[:500]!r}") from error
    return content


def wait_until(
    condition: Callable[[], bool], problem: str, *, seconds: float = _START_SECONDS
) -> None:
    """
    Raises:
        SystemExit: the condition does not come true in `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{problem} after {seconds:.0f} s")
        time.sleep(0.1)


@contextmanager
def _started(server: ServerProcess) -> Iterator[ServerProcess]:
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _busy_seconds() -> float:
    """Seconds that the cores of this machine have worked so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_seconds() -> float:
    """Seconds that this process and its children, those that ended too, have worked so far."""
    process = psutil.Process()
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # one that ends meanwhile is counted with its parent
            seconds += sum(each.cpu_times()[:4])
    return seconds
