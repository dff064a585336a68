"""One HTTP connection: uvicorn's on httptools, with limits on what a client may do to it.

uvicorn waits for ever for a request, takes headers of any length, and refuses in plain text. Here
headers have a size and a time, refusals have the typed body, and a client that neither sends nor
reads is let go. Idle connections that are kept alive cost a few kilobytes.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import HeadersTooLargeError, MalformedRequestError, ServiceError
from service.logs import fields

logger = logging.getLogger(__name__)

# Requests that wait on a connection until the one before them is answered.
_MAX_PIPELINED = 8
# How long a refused client may go on sending before the connection is cut: closed at once, with
# bytes unread, the connection would be reset and the client would not hear why.
_LINGER_SECONDS = 2.0
# An answer must make at least this progress in this time, or nobody is reading it.
_STALL_SECONDS = 30.0
_STALL_BYTES = 16 * 1024


class ConnectionLimits(NamedTuple):
    """What a client may do to a connection."""

    header_bytes: int
    header_seconds: float
    body_seconds: float  # also for a body whose request is answered already


class LimitedProtocol(HttpToolsProtocol):
    """Made by uvicorn for each connection; `limited_protocol` makes the class."""

    limits: ClassVar[ConnectionLimits]
    on_refusal: ClassVar[Callable[[ServiceError], None]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._reads_headers = True  # else: reads a body
        self._header_bytes = 0  # of the headers that are being read
        self._quiet_bytes = 0  # received since the parser last had something to show for it
        self._refusal: ServiceError | None = None  # what the parser is stopped with
        self._is_deaf = False  # what still comes is thrown away
        self._has_body = False  # a byte of the body that is being read has come

    # A connection begins and ends.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_timer(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._end_stall()
        # uvicorn only tells the newest request of a pipeline.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def _set_timer(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, self._time_is_up)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        """Headers, or a body that nobody waits for, took too long."""
        self._timer = None
        logger.debug("closed a connection that was too slow: %s", self.client)
        self._is_deaf = True
        if self._is_answering():
            self._close_after_answer()
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        """Close when the client has taken what is left for it, as long as it takes any."""
        self.transport.close()
        self._watch_progress()

    # Bytes come.

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._quiet_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or MalformedRequestError(_explain(error)))
            return
        if self._quiet_bytes > self.limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._reads_headers and self._timer is None:
            if self._quiet_bytes:
                self._set_timer(self.limits.header_seconds)
            elif not self._is_answering() and self.timeout_keep_alive_task is None:
                # The end of a body whose request had been answered before.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # An upgrade is an offer; the request is answered as it is, and so is the next.
                data = data[upgrade.args[0] :]
            else:
                return

    def _headers_too_large(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(
            f"the request's line and headers have more than the {self.limits.header_bytes} bytes "
            "that are allowed; send fewer or shorter headers, and options in the body"
        )

    def _stop_parser(self, error: ServiceError) -> None:
        """Leave a callback of the parser, which then takes nothing more."""
        self._refusal = error
        raise error

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_headers = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + len(b": \r\n"))
        if self._reads_headers:  # else a trailer, which must not pass for a header
            super().on_header(name, value)

    def _count_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self.limits.header_bytes:
            self._stop_parser(self._headers_too_large())

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and any(
            (name == b"content-length" and value != b"0") or name == b"transfer-encoding"
            for name, value in self.headers
        ):
            # The parser would take the body for the other protocol.
            self._stop_parser(
                MalformedRequestError("an upgrade with a body is not possible; send no Upgrade")
            )
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._stop_parser(
                MalformedRequestError(
                    f"{_MAX_PIPELINED} requests wait on this connection already; use more "
                    "connections, or wait for answers"
                )
            )
        try:
            super().on_headers_complete()
        except (httptools.HttpParserError, AttributeError, UnicodeDecodeError):
            self._stop_parser(MalformedRequestError(f"{self.url[:80]!r} is no path"))
        self._reads_headers = self._has_body = False
        self._quiet_bytes = self._header_bytes = 0
        self._cancel_timer()

    def on_body(self, body: bytes) -> None:
        self._quiet_bytes = 0
        self._has_body = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reads_headers = True
        self._quiet_bytes = 0
        self._cancel_timer()

    # Answers go.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_progress()
        elif self._is_answering():
            pass  # the next of a pipeline
        elif self._is_deaf:
            self._end_refused()
        elif not self._reads_headers and self.expect_100_continue and not self._has_body:
            # The client got its answer instead of a go-ahead, and need not send the body: the
            # parser would take its next request for it.
            self._close()
        elif not self._reads_headers:
            # Most clients read no answer before they have sent everything.
            self._set_timer(self.limits.body_seconds)

    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _close_after_answer(self) -> None:
        """Answer what has been asked for completely; the request that has not is forgotten."""
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        elif self._running is not None and self._running.more_body:
            self._close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer with `error` when the requests before are answered, and close."""
        self._is_deaf = True
        self._refusal = error
        self._cancel_timer()
        if not self._is_answering():
            self._end_refused()
            return
        running = self._running
        assert running is not None, "it is being answered"
        if running.more_body and not running.response_started:
            # Its own body is at fault: whoever waits for that hears that the client has gone.
            running.disconnected = True
            running.message_event.set()
            self._end_refused()
        else:
            self._close_after_answer()

    def _end_refused(self) -> None:
        """Send the refusal, and give the client a moment to read it."""
        self._unset_keepalive_if_required()
        if self._refusal is None:
            self._close()
            return
        error, request_id = self._refusal, f"{random.getrandbits(128):032x}"
        logger.info(
            "refused a request with %d: %s",
            error.status,
            error.message,
            extra=fields(status=error.status, request_id=request_id),
        )
        type(self).on_refusal(error)
        body = error.body(request_id).model_dump_json(exclude_none=True).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": request_id,
            "x-content-type-options": "nosniff",
        }
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        self.transport.write(head.encode() + b"\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    # The client reads slowly.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._end_stall()

    def _watch_progress(self) -> None:
        size = self.transport.get_write_buffer_size()
        if self._stall_timer is None and size:
            self._stall_timer = self.loop.call_later(_STALL_SECONDS, self._check_progress, size)

    def _check_progress(self, size_before: int) -> None:
        self._stall_timer = None
        if self.transport.get_write_buffer_size() > size_before - _STALL_BYTES:
            logger.info("cut a connection whose client does not read: %s", self.client)
            self.transport.abort()
        else:
            self._watch_progress()

    def _end_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def limited_protocol(
    limits: ConnectionLimits, on_refusal: Callable[[ServiceError], None]
) -> type[LimitedProtocol]:
    """The class to give to uvicorn as `http`.

    Args:
        limits: For every connection.
        on_refusal: Hears of every request that is refused here, before the application sees it.
    """
    return type(
        "Protocol", (LimitedProtocol,), {"limits": limits, "on_refusal": staticmethod(on_refusal)}
    )


def _explain(error: httptools.HttpParserError) -> str:
    reason = str(error.__context__ or error) or type(error).__name__
    return f"the request is not HTTP/1.1 as it should be: {reason[:200]}"
