"""The edge of the service around a few plain routes: no model, so it is up in a moment."""

import asyncio
import contextlib
import socket
import threading
import time

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from service import errors
from service.metrics import Metrics
from service.middleware import error_response, install
from service.server import DrainingServer
from service.settings import Settings


class SmallService:
    """What the edge knows of the real one."""

    def __init__(self, settings):
        self.settings = settings
        self.metrics = Metrics()
        self.in_flight = 0
        self.failure = None
        self.default_digest = "sha256:0123"
        self.is_draining = False
        self.is_stuck = False
        self.seen = []  # what the routes saw
        self.seen_headers = []
        self.ended = []  # how the route /features?wait=S was left

    def check_accepting(self):
        if self.failure is not None:
            raise errors.NotReadyError("the engine has failed")
        if self.is_draining:
            raise errors.DrainingError("the service is shutting down")

    def refresh_gauges(self):
        pass

    def drain(self):
        self.is_draining = True

    def check_health(self):
        if self.is_stuck:
            self.failure = RuntimeError("stuck")


def small_app(**changes):
    """An application with `state.service`, its settings changed by `changes`."""
    settings = Settings(**({"model": "m", "port": 0} | changes))
    service = SmallService(settings)
    app = FastAPI(version="1.2.3")
    app.state.service = service
    install(app, service)

    @app.exception_handler(errors.ServiceError)
    async def answer(request: Request, error: errors.ServiceError):
        return error_response(error, request.state.request_id, service)

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException):
        known = errors.NotFoundError(f"no such path: {error.detail}")
        return error_response(known, request.state.request_id, service)

    @app.post("/features")
    async def features(request: Request, wait: float = 0, fails: bool = False):
        service.seen.append(dict(request.scope["state"]))
        body = await request.body()
        service.seen_headers.append(list(request.scope["headers"]))
        if fails:
            raise RuntimeError("planted failure")
        try:
            await asyncio.sleep(wait)
        except asyncio.CancelledError:
            service.ended.append("cancelled")
            raise
        return Response(body)

    @app.get("/slowly")
    async def slowly():
        async def parts():
            for _ in range(4):
                yield b"part"
                await asyncio.sleep(0.1)

        return StreamingResponse(parts())

    @app.get("/large")
    async def large(mib: int):
        return Response(bytes(mib * 1024 * 1024))

    @app.post("/json")
    async def json_body(document: dict[str, int]):
        return document

    @app.get("/livez")
    @app.get("/readyz")
    @app.get("/startupz")
    @app.get("/healthz")
    @app.get("/")
    @app.get("/info")
    @app.get("/metrics")
    @app.get("/admin/models")
    async def say_ok():
        return {"status": "ok"}

    return app


class RunningServer:
    """The server of an application in a thread of this process."""

    def __init__(self, app):
        self.service = app.state.service
        self.server = DrainingServer(app, self.service.settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started or not self.thread.is_alive())
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def connect(self, seconds=10.0):
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def ask(self, request):
        """Everything that comes back for some bytes until the server closes."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_all(connection)

    def connections(self):
        return len(self.server.server_state.connections)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(app):
    server = RunningServer(app)
    try:
        yield server
    finally:
        server.stop()


def read_all(connection):
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
