"""A service around a tiny artifact, in this process and as a process of its own."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from backbone import open_model
from service.app import create_app
from service.settings import Settings
from tests.support import tiny_artifact

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(artifact):
    """A function that makes settings for the tiny artifact."""

    def make(**changes):
        defaults = {
            "model": str(artifact),
            "precision": "fp32",
            "decode_threads": 2,
            "torch_threads": 1,
            "port": 0,
        }
        return Settings(**(defaults | changes))

    return make


class WatchedEncoder:
    """An encoder that notes its batches, can be held up, and fails where a test wants it."""

    def __init__(self, encoder):
        self._encoder = encoder
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.fails = lambda _: False
        self.error = RuntimeError("planted failure")

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, images, **options):
        self.batches.append(tuple(images.shape))
        self.entered.release()
        assert self.gate.wait(10)
        if self.fails(images):
            raise self.error
        return self._encoder.encode(images, **options)

    def hold(self):
        """Forget what warm-up did and let the next forward wait for `gate`."""
        self.batches.clear()
        self.gate.clear()
        while self.entered.acquire(blocking=False):
            pass

    def wait_until_held(self):
        assert self.entered.acquire(timeout=10)


@pytest.fixture
def watched_encoder(artifact):
    return WatchedEncoder(open_model(artifact, precision="fp32"))


@contextmanager
def running_client(settings, open_encoder=None):
    app = create_app(settings, open_encoder)
    with TestClient(app) as client:
        wait_until_ready(lambda: client.get("/readyz").status_code)
        yield client


def wait_until_ready(readyz, seconds=60.0):
    deadline = time.monotonic() + seconds
    while readyz() != 200:
        assert time.monotonic() < deadline, "the service did not get ready"
        time.sleep(0.02)


@pytest.fixture
def serve(settings):
    """A context manager: a client of a service with changed settings or another encoder."""

    def make(open_encoder=None, **changes):
        return running_client(settings(**changes), open_encoder)

    return make


@pytest.fixture(scope="module")
def client(artifact):
    """A client of a service with the default limits."""
    settings = Settings(model=str(artifact), precision="fp32", decode_threads=2, torch_threads=1)
    with running_client(settings) as client:
        yield client


class ServerProcess:
    """`python -m service` on a free port."""

    def __init__(self, arguments, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.client = httpx.Client(base_url=self.url, timeout=60)
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "--port", str(port), *arguments],
                cwd=REPOSITORY,
                stderr=stream,
            )

    def readyz(self):
        """Status of the probe; 0 while nobody listens."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/readyz").status_code
        except httpx.TransportError:
            return 0


@pytest.fixture(scope="module")
def server_process(artifact, tmp_path_factory):
    """A function that starts a server process and returns when it is ready."""
    started = []

    def start(*arguments, model=artifact, wait=True):
        log = tmp_path_factory.mktemp("server") / "log"
        server = ServerProcess(["--model", str(model), *arguments], log)
        started.append(server)
        if wait:
            wait_until_ready(server.readyz)
        return server

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
        server.client.close()
