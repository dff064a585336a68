"""uvicorn's server with a drain: on SIGTERM it takes no more requests and finishes those it has."""

import logging
import math
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.lifecycle import FeatureService
from service.settings import Settings

logger = logging.getLogger(__name__)

# Longer than the idle time of common proxies and client pools: the side that asks should be the
# one that closes, or it now and then sends a request into a closed connection.
_KEEP_ALIVE_SECONDS = 75


class DrainingServer(uvicorn.Server):
    """Keeps listening while it drains, so that probes hear `draining` and not a closed port."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        )
        super().__init__(config)
        self._service: FeatureService = app.state.service
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

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true ends the server."""
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

    def _stop(self, cuts_requests: bool) -> None:
        if cuts_requests:
            logger.error("%d requests in flight were cut off", self._service.in_flight)
            self.exit_status = 1
        self.should_exit = True
