"""One request and its answer as they pass by: what they are called, weigh, and may take."""

import asyncio
import math
import random
import re
import time
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import StageSpan, trace_context

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_LOGGED_PATH = 200


class GuardedService(Protocol):
    """What the edge needs to know of the service behind it."""

    settings: Settings
    metrics: Metrics
    in_flight: int  # requests for features
    failure: Exception | None  # why the process has to end

    @property
    def default_digest(self) -> str | None:
        """Of the default model, once it is loaded."""

    def check_accepting(self) -> None:
        """
        Raises:
            NotReadyError, DrainingError: requests are not taken now.
        """

    def drain(self) -> None:
        """Take no more requests."""

    def refresh_gauges(self) -> None:
        """Bring the metrics that change by themselves up to date."""

    def check_health(self) -> None:
        """Set `failure` if an engine is stuck; called ten times a second."""


class Exchange:
    """One request and its answer; `receive` and `send` are to be given to the application."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, service: GuardedService, *, samples: bool
    ) -> None:
        self.scope = scope
        self.started = time.perf_counter()
        self.loop = asyncio.get_running_loop()
        self.request_id = request_id_of(scope)
        self.trace = trace_context(Headers(scope=scope).getlist("traceparent"), samples=samples)
        self.deadline = math.inf  # in the loop's time
        self.status = 0  # of the answer that has begun
        self.received_bytes = self.sent_bytes = 0
        self.stages: list[StageSpan] = []
        scope.setdefault("state", {}).update(
            request_id=self.request_id, deadline=None, key=None, stages=self.stages
        )
        # As it was sent: decoded, it could hold a line break and forge lines of the log.
        raw_path = scope.get("raw_path") or scope["path"].encode("ascii", "backslashreplace")
        self.path = ascii(raw_path.decode("latin-1"))[1:-1][:_MAX_LOGGED_PATH]
        self._receive = receive
        self._send = send
        self._service = service
        self._timer: asyncio.Timeout | None = None
        self._body_deadline: float | None = None  # set when the body is first asked for
        self._has_body = False

    async def run(self, app: ASGIApp) -> None:
        """Let `app` answer, but cancel it when it has not begun to by the deadline.

        Raises:
            DeadlineError, BodyTooSlowError: that happened.
        """
        timer = asyncio.timeout(None)
        try:
            async with timer:
                self._timer = timer
                self._set_timer()
                await app(self.scope, self.receive, self.send)
        except TimeoutError:
            if not timer.expired():
                raise
        finally:
            self._timer = None
        if timer.expired() and not self.status:
            raise self._timeout_error()

    def _timeout_error(self) -> errors.ServiceError:
        settings = self._service.settings
        if self._next_timeout() < self.deadline:
            error = errors.BodyTooSlowError(
                f"{self.received_bytes} bytes of the body came in {settings.body_seconds:g} s and "
                "it was not complete; send fewer images at once, or over a faster connection"
            )
            error.headers = {"connection": "close"}
            return error
        seconds = time.perf_counter() - self.started
        return errors.DeadlineError(
            f"no answer within {math.ceil(seconds * 1e3)} ms; allow more with x-deadline-ms (at "
            f"most {round(settings.request_seconds * 1e3)}), or send fewer images at once"
        )

    def _set_timer(self) -> None:
        if self._timer is None or self._timer.expired():
            return
        when = self._next_timeout()
        self._timer.reschedule(None if self.status or when == math.inf else when)

    def _next_timeout(self) -> float:
        if self._body_deadline is None or self._has_body:
            return self.deadline
        return min(self.deadline, self._body_deadline)

    async def receive(self) -> Message:
        """The next part of the request."""
        if self._body_deadline is None:
            self._body_deadline = self.loop.time() + self._service.settings.body_seconds
            self._set_timer()
        message = await self._receive()
        if message["type"] == "http.request":
            self.received_bytes += len(message.get("body", b""))
            if not message.get("more_body", False) and not self._has_body:
                self._has_body = True
                self._set_timer()
        return message

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._set_timer()
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["traceparent"] = self.trace.header
            headers["x-content-type-options"] = "nosniff"
            digest = self._service.default_digest
            if digest is not None:
                headers.setdefault("x-model-digest", digest)
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)


def request_id_of(scope: Scope) -> str:
    """The client's `x-request-id` when it is fit for a log line, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
