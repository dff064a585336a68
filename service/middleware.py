"""What every request gets: an id, the model's digest, counting, and a typed answer to any fault."""

import logging
import random
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InternalError, ServiceError
from service.lifecycle import FeatureService

logger = logging.getLogger(__name__)

# Never sent: the metrics' word for a client that left before its answer.
CLIENT_CLOSED_REQUEST = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestMiddleware:
    """Pure ASGI, so that bodies and answers pass without being copied."""

    def __init__(self, app: ASGIApp, service: FeatureService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                encoder = self._service.engines[0].encoder
                if encoder is not None:
                    headers["x-model-digest"] = encoder.digest
            await send(message)

        counts = scope["path"] == "/features"
        self._service.in_flight += counts
        self._service.metrics.in_flight.set(self._service.in_flight)
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            self._service.metrics.abandoned.inc()
            status = CLIENT_CLOSED_REQUEST
        except Exception:  # the client must get a typed answer, whatever it is
            logger.exception("request %s failed", request_id)
            if status:
                raise  # half an answer is out: only closing the connection tells the client
            error = InternalError(f"the service failed; its log has the reason under {request_id}")
            await self.respond(error, request_id)(scope, receive, send_with_headers)
        finally:
            self._service.in_flight -= counts
            self._service.metrics.in_flight.set(self._service.in_flight)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(route, str(status)).inc()
            if counts:
                self._service.metrics.request_seconds.observe(seconds)
            logger.debug(
                "%s %s %d %.1f ms %s",
                scope["method"],
                scope["path"],
                status,
                seconds * 1e3,
                request_id,
            )

    def respond(self, error: ServiceError, request_id: str) -> Response:
        return error_response(error, request_id, self._service)


def error_response(error: ServiceError, request_id: str, service: FeatureService) -> Response:
    """The answer that tells a client of `error`."""
    service.metrics.errors.labels(error.code).inc()
    return Response(
        error.body(request_id).model_dump_json(exclude_none=True),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


def request_id_of(scope: Scope) -> str:
    """The client's `x-request-id` when it is fit for a log line, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
