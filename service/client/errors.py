"""Every error of the client: what a program decides by, in one place.

FeatureError
  InputError                an image cannot be read or sent; nothing was asked of the service
  RefusedError              4xx: the service does not take the request, or not this image
    AuthenticationError     401, 403
  OverloadedError           429
  UnavailableError          502, 503
  DeadlineError             504, and the call's own deadline
  ServerError               the other 5xx: the service failed
  ConnectionFailedError     no answer, or half of one
  AnswerError               an answer that is not what was asked for
"""

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx2 as httpx
import orjson

# What may succeed later, where the answer itself does not say (a proxy's, for instance).
_RETRYABLE_STATUSES = frozenset({408, 429, 502, 503, 504})
_SHOWN_CHARACTERS = 200
_IMAGE_NUMBER = re.compile(r"^image \d+: ")


class FeatureError(Exception):
    """Why there are no features.

    Attributes:
        code: Stable name, the service's own where it sent one.
        message: What came, what was wanted, what to do.
        retryable: Whether the same request may succeed later.
        request_id: Under which the service logged it; None when nothing was answered.
        index: Which image of the call, from 0; None when the error is about no single image.
        status: HTTP status; None when nothing was answered.
        retry_after_seconds: How long the service asked to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        retryable: bool = False,
        request_id: str | None = None,
        index: int | None = None,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.retryable = retryable
        self.request_id = request_id
        self.index = index
        self.status = status
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        which = "" if self.index is None else f"image {self.index}: "
        under = f" (request {self.request_id})" if self.request_id else ""
        return f"{which}{self.message} [{self.code}]{under}"

    def about(self, index: int | None) -> "FeatureError":
        """The same error about image `index` of the call."""
        error = type(self)(
            self.message,
            code=self.code,
            retryable=self.retryable,
            request_id=self.request_id,
            index=index,
            status=self.status,
            retry_after_seconds=self.retry_after_seconds,
        )
        error.__cause__ = self.__cause__
        return error

    @property
    def is_about_the_request(self) -> bool:
        """Whether every other image would meet it too: a wrong key, a wrong option."""
        return (
            isinstance(self, RefusedError)
            and not self.retryable
            and self.index is None
            and self.code != "body_too_large"
        )


class InputError(FeatureError):
    """An image cannot be read or sent; the service was not asked."""


class RefusedError(FeatureError):
    """The service does not take the request, or not this image."""


class AuthenticationError(RefusedError):
    """The API key is missing, unknown, or lacks the right."""


class OverloadedError(FeatureError):
    """The service has as much work as it takes."""


class UnavailableError(FeatureError):
    """The service is starting, shutting down, or cannot be reached through its proxy."""


class DeadlineError(FeatureError):
    """The answer was not there by the deadline."""


class ServerError(FeatureError):
    """The service failed; its log has more under the request id."""


class ConnectionFailedError(FeatureError):
    """The service could not be reached, or the connection broke before the answer's end."""


class AnswerError(FeatureError):
    """The answer is not what was asked for: another service, or one that is broken."""


# An image's error inside an answer has no status of its own.
_CLASS_OF_CODE: dict[str, type[FeatureError]] = {
    "deadline_exceeded": DeadlineError,
    "overloaded": OverloadedError,
    "not_ready": UnavailableError,
    "draining": UnavailableError,
    "url_not_fetched": UnavailableError,
    "internal": ServerError,
    "encoding_failed": ServerError,
}


def from_answer(status: int, headers: httpx.Headers, body: bytes | bytearray) -> FeatureError:
    """The error that an answer with this status and body tells of."""
    detail = _detail(body)
    index = detail.get("index")
    if detail:
        code, message = str(detail.get("code")), _message(detail)
        retryable = detail.get("retryable") is True
    else:
        shown = bytes(body[: 4 * _SHOWN_CHARACTERS]).decode("utf-8", "replace")
        code, message = f"http_{status}", shown.strip()[:_SHOWN_CHARACTERS] or "no explanation"
        retryable = status in _RETRYABLE_STATUSES
    return _class_of(status)(
        message,
        code=code,
        retryable=retryable,
        request_id=detail.get("request_id") or headers.get("x-request-id"),
        index=index if isinstance(index, int) else None,
        status=status,
        retry_after_seconds=_retry_after(headers.get("retry-after")),
    )


def from_detail(detail: Mapping[str, Any], *, request_id: str | None) -> FeatureError:
    """The error of one image inside an answer about several: `{code, message, retryable}`."""
    code = str(detail.get("code"))
    kind = _CLASS_OF_CODE.get(code, RefusedError)
    return kind(
        _message(detail),
        code=code,
        retryable=detail.get("retryable") is True,
        request_id=request_id,
    )


def from_transport(error: httpx.TransportError, url: str) -> FeatureError:
    """The error that stands for a connection that failed."""
    is_timeout = isinstance(error, httpx.TimeoutException)
    # Another try meets the same address, certificate or protocol.
    is_lasting = isinstance(
        error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.ProxyError
    )
    failed = ConnectionFailedError(
        f"{url} {'did not answer in time' if is_timeout else 'cannot be reached'}: "
        f"{type(error).__name__} {error}".strip(),
        code="timeout" if is_timeout else "connection_failed",
        retryable=not is_lasting,
    )
    failed.__cause__ = error
    return failed


def _message(detail: Mapping[str, Any]) -> str:
    # The service counts the images of a request, the caller those of a call.
    return _IMAGE_NUMBER.sub("", str(detail.get("message")))


def _detail(body: bytes | bytearray) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    detail = document.get("error") if isinstance(document, dict) else None
    return detail if isinstance(detail, dict) else {}


def _class_of(status: int) -> type[FeatureError]:
    if status in (401, 403):
        return AuthenticationError
    if status == 429:
        return OverloadedError
    if status in (502, 503):
        return UnavailableError
    if status == 504:
        return DeadlineError
    if 400 <= status < 500:
        return RefusedError
    return ServerError if status >= 500 else AnswerError


def _retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which is a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())
