"""uvicorn's server with a drain: on SIGTERM it takes no more requests and finishes those it has.

It also watches the engines, and serves the metrics on a port of their own where one is set.
"""

import asyncio
import logging
import math
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.config import STARTUP_FAILURE

from service import errors
from service.exchange import GuardedService, request_id_of
from service.middleware import error_response
from service.protocol import ConnectionLimits, LimitedProtocol, limited_protocol
from service.settings import Settings

logger = logging.getLogger(__name__)

# Longer than the idle time of common proxies and client pools: the side that asks should be the
# one that closes, or it now and then sends a request into a closed connection.
_KEEP_ALIVE_SECONDS = 75
# Requests that will not be finished: time to hear of it by themselves, then to answer when told.
_LAST_SECONDS = 1.0
_TICK_SECONDS = 0.1


class DrainingServer(uvicorn.Server):
    """Keeps listening while it drains, so that probes hear `draining` and not a closed port."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._service: GuardedService = app.state.service
        self._protocol = limited_protocol(
            ConnectionLimits(
                header_bytes=settings.max_header_bytes,
                header_seconds=settings.header_seconds,
                body_seconds=settings.body_seconds,
            ),
            self._count_refusal,
        )
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=self._protocol,
            ws="none",
            loop="auto",  # uvloop, which is installed on Linux
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        )
        super().__init__(config)
        self._metrics_port = settings.metrics_port
        self._drain_seconds = settings.drain_seconds
        self._deadline = math.inf
        self.exit_status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """First signal: drain. Second: stop at once."""
        if self._deadline < math.inf:
            self._stop(self._service.in_flight > 0)
            self.force_exit = True
            return
        self._deadline = time.monotonic() + self._drain_seconds
        self._service.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._metrics_port is not None:
            await self._listen_for_metrics(self._metrics_port)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true ends the server."""
        self._service.check_health()
        if self._service.failure is not None:
            self.exit_status = 1
            return True
        if self._deadline < math.inf:
            left_seconds = self._deadline - time.monotonic()
            if self._service.in_flight == 0 or left_seconds <= 0:
                # What is left is for connections that are slow to take their answers.
                self.config.timeout_graceful_shutdown = max(1, math.ceil(left_seconds))
                self._stop(self._service.in_flight > 0)
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer every request that is left, if only with a 503, and end."""
        if self._service.in_flight > 0:
            await self._end_requests()
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done():
            await asyncio.wait((ending,), timeout=_TICK_SECONDS)
            if self.force_exit:
                # From Python 3.12 on a server waits for its connections to be closed.
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
        await ending

    async def _end_requests(self) -> None:
        if self._service.failure is not None:
            self.config.timeout_graceful_shutdown = math.ceil(_LAST_SECONDS)
        tasks = set(self.server_state.tasks)
        if tasks and not self.force_exit:
            _, tasks = await asyncio.wait(tasks, timeout=_LAST_SECONDS)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_SECONDS)

    def _stop(self, cuts_requests: bool) -> None:
        if cuts_requests:
            logger.error("%d requests in flight were cut off", self._service.in_flight)
            self.exit_status = 1
        self.should_exit = True

    def _count_refusal(self, error: errors.ServiceError) -> None:
        self._service.metrics.errors.labels(error.code).inc()
        self._service.metrics.requests.labels("other", str(error.status)).inc()

    async def _listen_for_metrics(self, port: int) -> None:
        """Like the main port, uvicorn closes it and its connections at the end."""
        config = uvicorn.Config(
            self._answer_metrics,
            interface="asgi3",  # of a method uvicorn cannot tell
            http=self._protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        config.load()
        loop = asyncio.get_running_loop()

        def connect() -> LimitedProtocol:
            return self._protocol(config, self.server_state, {}, _loop=loop)

        host = self.config.host
        try:
            server = await loop.create_server(connect, host, port)
        except OSError as error:
            logger.error("metrics: %s", error)
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self.servers.append(server)
        shown = f"[{host}]" if ":" in host else host
        logger.info("metrics on http://%s:%d/metrics", shown, server.sockets[0].getsockname()[1])

    async def _answer_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path != "/metrics":
            error: errors.ServiceError = errors.NotFoundError(
                f"no path {path[:80]!r} on this port; only /metrics"
            )
        elif method not in ("GET", "HEAD"):
            error = errors.MethodNotAllowedError(f"/metrics does not take {method}; use GET")
        else:
            self._service.refresh_gauges()
            metrics = Response(self._service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
            await metrics(scope, receive, send)
            return
        await error_response(error, request_id_of(scope), self._service)(scope, receive, send)
