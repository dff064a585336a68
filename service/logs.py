"""Log lines: text for people, or one JSON object a line for machines.

`bind` gives every line of a request the fields that identify it, `note` adds what is found out
about it, and a single call adds its own with `extra=fields(status=200)`.
"""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

_CONSOLE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NO_FIELDS: Mapping[str, Any] = {}
_request_fields: ContextVar[dict[str, Any] | None] = ContextVar("request_fields", default=None)

logger = logging.getLogger("service")


def configure(level: str, log_format: Literal["console", "json"]) -> None:
    """Send the log of the process, uvicorn's and Python's warnings included, to stderr.

    Args:
        level: Least severe level that is written, as "info".
        log_format: Text, where an exception takes several lines, or JSON, where it does not.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_CONSOLE))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)  # odd images make Pillow warn
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        uvicorn_logger = logging.getLogger(name)
        uvicorn_logger.handlers.clear()
        uvicorn_logger.propagate = True
    for name in ("httpx2", "httpcore2"):  # they log URLs, which may hold signatures
        logging.getLogger(name).setLevel(logging.WARNING)
    if log_format == "json":
        # Python's own would write a traceback of many lines.
        sys.excepthook = _log_exception
        threading.excepthook = _log_thread_exception


def bind(**values: Any) -> Token[dict[str, Any] | None]:
    """Let every log line of this context, and of tasks begun in it, carry `values`."""
    return _request_fields.set(values)


def note(**values: Any) -> None:
    """Add to what the request of this context carries, in log lines and in its span."""
    bound = _request_fields.get()
    if bound is not None:
        bound.update(values)


def noted() -> Mapping[str, Any]:
    """What the request of this context carries."""
    return _request_fields.get() or _NO_FIELDS


def unbind(token: Token[dict[str, Any] | None]) -> None:
    """Undo a `bind`."""
    _request_fields.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """The `extra=` of a log call whose JSON line carries `values`; None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object: timestamp (RFC 3339, UTC), level, logger, message, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        created = datetime.fromtimestamp(record.created, UTC)
        document: dict[str, Any] = {
            "timestamp": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for values in (noted(), getattr(record, "fields", _NO_FIELDS)):
            for name, value in tuple(values.items()):
                document.setdefault(name, value)
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            document["stack"] = record.stack_info
        # ASCII: no line separator of Unicode, and no lone surrogate, reaches who reads the lines.
        return json.dumps(document, default=str)


def _log_exception(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logger.critical("the process failed", exc_info=(kind, error, traceback))


def _log_thread_exception(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is None or issubclass(failure.exc_type, SystemExit):
        return
    name = failure.thread.name if failure.thread else "?"
    logger.critical(
        "thread %s failed",
        name,
        exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback),
    )
