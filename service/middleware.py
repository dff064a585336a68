"""The edge of the service: what every request gets before and after its route sees it.

An id and a place in a trace, a check of its key before its body is read, a deadline, a typed
answer to any fault, a log line, and counting.
"""

import asyncio
import logging
import math
import re
import time

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import errors, logs
from service.access import PROBES, check_access, is_admin_path
from service.exchange import Exchange, GuardedService
from service.keys import KeyRing
from service.settings import SettingsError
from service.tracing import Tracer, open_tracer

logger = logging.getLogger(__name__)

# Never sent: the metrics' word for a client that left before its answer.
CLIENT_CLOSED_REQUEST = 499
_FEATURES = "/features"
_ORIGIN = re.compile(r"https?://[^/*?#\s]+")
_MILLISECONDS = re.compile(r"0{0,8}[1-9][0-9]{0,15}")
# Fields of every log line that are no attributes of a span.
_IDENTITY = frozenset({"request_id", "trace_id", "span_id"})

_CORS_REQUEST_HEADERS = (
    "authorization", "content-type", "if-none-match", "traceparent", "x-api-key", "x-deadline-ms",
    "x-request-id",
)  # fmt: skip
_CORS_RESPONSE_HEADERS = (
    "etag", "retry-after", "server-timing", "x-cache", "x-dtype", "x-features", "x-model-digest",
    "x-request-id", "x-shape",
)  # fmt: skip
_CORS_MAX_AGE_SECONDS = 600


def install(app: FastAPI, service: GuardedService) -> None:
    """Put the edge around `app`; `app.state.tracer` is to be closed at the end, if it is one.

    Raises:
        SettingsError: the key file cannot be used, tracing is not installed, or an origin is none.
    """
    settings = service.settings
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise SettingsError(f"--cors-origins has {origin!r}; write each as https://host[:port]")
    keys = None if settings.api_key_file is None else KeyRing(settings.api_key_file)
    tracer = open_tracer(settings, app.version)
    app.state.tracer = tracer
    app.add_middleware(RequestMiddleware, service=service, keys=keys, tracer=tracer)
    if settings.cors_origins:
        # Around the other: a browser asks for permission without a key, and a page may only read
        # an error that has these headers too.
        app.add_middleware(
            CrossOriginMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
            max_age=_CORS_MAX_AGE_SECONDS,
        )


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's, for pages of the origins that the operator names."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        response.headers["x-content-type-options"] = "nosniff"
        return response


class RequestMiddleware:
    """Pure ASGI, so that bodies and answers pass without being copied.

    Routes find in `scope["state"]`: `request_id`; `deadline`, in the event loop's time, or None;
    `key`, the name of the client's key, or None; and `stages`, a list of `tracing.StageSpan` that
    they may fill.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: GuardedService,
        keys: KeyRing | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # there are none, keyless or not
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._service, samples=self._tracer is not None)
        counts = scope["path"] == _FEATURES
        self._service.in_flight += counts
        self._service.metrics.in_flight.set(self._service.in_flight)
        token = logs.bind(
            request_id=exchange.request_id,
            trace_id=exchange.trace.trace_id,
            span_id=exchange.trace.span_id,
        )
        try:
            await self._answer(exchange)
        finally:
            self._service.in_flight -= counts
            self._service.metrics.in_flight.set(self._service.in_flight)
            self._finish(exchange, counts=counts)
            logs.unbind(token)

    async def _answer(self, exchange: Exchange) -> None:
        """The application's answer, or one that says why there is none."""
        scope = exchange.scope
        try:
            identity = check_access(scope, self._keys)
            if identity is not None:
                scope["state"]["key"] = identity.name
                logs.note(key=identity.name)
            exchange.deadline = self._deadline(scope, exchange.loop.time())
            if exchange.deadline < math.inf:
                scope["state"]["deadline"] = exchange.deadline
            await exchange.run(self._app)
        except ClientDisconnect:
            self._service.metrics.abandoned.inc()
            exchange.status = CLIENT_CLOSED_REQUEST
        except errors.ServiceError as error:
            await self._respond(exchange, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                await self._fail(exchange)  # something that was awaited has been cancelled
            elif exchange.status:  # the server closes the connection
                logger.warning("the answer to request %s was cut off", exchange.request_id)
            else:  # the server stops and will not wait any longer
                await self._respond(exchange, self._reason_to_stop())
        except Exception:  # noqa: BLE001 - the client must get a typed answer, whatever it is
            await self._fail(exchange)

    async def _fail(self, exchange: Exchange) -> None:
        """Called while an exception is handled."""
        logger.exception("request %s failed", exchange.request_id)
        if exchange.status:
            raise  # half an answer is out: only closing the connection tells the client
        await self._respond(
            exchange,
            errors.InternalError(
                f"the service failed; its log has the reason under {exchange.request_id}"
            ),
        )

    async def _respond(self, exchange: Exchange, error: errors.ServiceError) -> None:
        response = error_response(error, exchange.request_id, self._service)
        await response(exchange.scope, exchange.receive, exchange.send)

    def _reason_to_stop(self) -> errors.ServiceError:
        try:
            self._service.check_accepting()
        except errors.ServiceError as error:
            return error
        return errors.DrainingError("the service is shutting down and could not finish in time")

    def _deadline(self, scope: Scope, now: float) -> float:
        """
        Raises:
            InvalidDeadlineError: `x-deadline-ms` is no positive whole number.
        """
        # To load a model takes as long as it takes.
        is_admin = is_admin_path(scope["path"])
        most = math.inf if is_admin else self._service.settings.request_seconds
        given = Headers(scope=scope).get("x-deadline-ms")
        if given is None:
            return now + most
        if not _MILLISECONDS.fullmatch(given):
            raise errors.InvalidDeadlineError(
                f"x-deadline-ms is {given[:80]!r}; send a whole number of milliseconds, at least 1"
            )
        return now + min(most, int(given) / 1e3)

    def _finish(self, exchange: Exchange, *, counts: bool) -> None:
        """Count the request, log it, and send its span."""
        scope, status = exchange.scope, exchange.status
        seconds = time.perf_counter() - exchange.started
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(route, str(status)).inc()
        if counts:
            self._service.metrics.request_seconds.observe(seconds)
        is_news = counts or (status >= 400 and scope["path"] not in PROBES)
        known = logs.noted()
        logger.log(
            logging.INFO if is_news else logging.DEBUG,
            "%s %s %d %.1f ms %s trace=%s key=%s model=%s %d bytes",
            scope["method"],
            exchange.path,
            status,
            seconds * 1e3,
            exchange.request_id,
            exchange.trace.trace_id,
            known.get("key", "-"),
            known.get("model", "-"),
            exchange.sent_bytes,
            extra=logs.fields(
                method=scope["method"],
                path=exchange.path,
                status=status,
                seconds=round(seconds, 6),
                received_bytes=exchange.received_bytes,
                bytes=exchange.sent_bytes,
            ),
        )
        if self._tracer is not None and counts:
            found_out = known.keys() - _IDENTITY
            self._tracer.record(
                exchange.trace,
                f"{scope['method']} {_FEATURES}",
                seconds=seconds,
                attributes={
                    "http.request.method": scope["method"],
                    "http.route": _FEATURES,
                    "http.response.status_code": status,
                    **{f"refinery.{name}": known[name] for name in found_out},
                },
                failed=status >= 500,
                stages=exchange.stages,
            )


def error_response(
    error: errors.ServiceError, request_id: str, service: GuardedService
) -> Response:
    """The answer that tells a client of `error`."""
    service.metrics.errors.labels(error.code).inc()
    logs.note(error=error.code)
    return Response(
        error.body(request_id).model_dump_json(exclude_none=True),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )
