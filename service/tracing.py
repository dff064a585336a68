"""W3C trace context of a request, and spans by OpenTelemetry where an endpoint is set.

The trace context costs nothing but a few random digits and is there always. Spans need the extra
`otel`; nothing leaves the process without `--otlp-endpoint`.
"""

import importlib.util
import logging
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from service.settings import Settings, SettingsError, without_password

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

# version 00, and later versions as far as they start alike (W3C Trace Context, 2.2 and 4)
_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_SAMPLED = 1
_EXPORT_SECONDS = 5.0
_CLOSE_SECONDS = 3.0
_EXPORTER_MODULE = "opentelemetry.exporter.otlp.proto.http"


class TraceContext(NamedTuple):
    """Where a request belongs in a distributed trace; ids in lower-case hexadecimal."""

    trace_id: str
    span_id: str  # of this service's own span
    parent_id: str | None  # span of the caller
    flags: int

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def trace_context(traceparents: Sequence[str], *, samples: bool = False) -> TraceContext:
    """The caller's trace with a new span in it; a new trace without a valid `traceparent`.

    Args:
        traceparents: The values of all `traceparent` headers; two are as good as none.
        samples: Whether a new trace is marked as recorded.
    """
    span_id = f"{random.getrandbits(64) or 1:016x}"
    match = _TRACEPARENT.fullmatch(traceparents[0]) if len(traceparents) == 1 else None
    if (
        match is None
        or match["version"] == "ff"
        or (match["version"] == "00" and match["more"] is not None)
        or int(match["trace"], 16) == 0
        or int(match["span"], 16) == 0
    ):
        trace_id = f"{random.getrandbits(128) or 1:032x}"
        return TraceContext(trace_id, span_id, None, _SAMPLED if samples else 0)
    return TraceContext(match["trace"], span_id, match["span"], int(match["flags"], 16) & _SAMPLED)


class StageSpan(NamedTuple):
    """A stage of a request, in seconds of `time.perf_counter`."""

    name: str
    started: float
    ended: float


class Tracer(Protocol):
    """Takes finished requests and sends them as spans, some time, from another thread."""

    def record(
        self,
        context: TraceContext,
        name: str,
        *,
        seconds: float,
        attributes: Mapping[str, Any],
        failed: bool,
        stages: Sequence[StageSpan] = (),
    ) -> None:
        """A request is over; `seconds` is how long it took until now."""

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""


def open_tracer(settings: Settings, version: str) -> Tracer | None:
    """A tracer where `otlp_endpoint` is set.

    Raises:
        SettingsError: the extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        is_installed = importlib.util.find_spec(_EXPORTER_MODULE) is not None
    except ModuleNotFoundError:  # not even its parent
        is_installed = False
    if not is_installed:
        raise SettingsError(
            "--otlp-endpoint needs OpenTelemetry, which is not installed: "
            "pip install 'vit-refinery[otel]'"
        )
    return OpenTelemetryTracer(settings.otlp_endpoint, version)


class OpenTelemetryTracer:
    """Spans over OTLP/HTTP, in batches; what does not fit its queue of 2048 is dropped.

    Args:
        endpoint: Of the collector, as http://collector:4318; /v1/traces is added.
        version: Of this service.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        # It logs every failed attempt, and every span that a full queue drops.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
        url = endpoint.rstrip("/") + path
        tracer = self

        class Ids(RandomIdGenerator):
            def generate_trace_id(self) -> int:
                return tracer._next_ids[0] or super().generate_trace_id()

            def generate_span_id(self) -> int:
                return tracer._next_ids[1] or super().generate_span_id()

        self._next_ids = (0, 0)  # of the span that is made next; 0: random
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "vit-refinery", "service.version": version}),
            id_generator=Ids(),
            shutdown_on_exit=False,
        )
        exporter = _logging_once(
            OTLPSpanExporter(endpoint=url, timeout=_EXPORT_SECONDS), without_password(url)
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("service", version)

    def record(
        self,
        context: TraceContext,
        name: str,
        *,
        seconds: float,
        attributes: Mapping[str, Any],
        failed: bool,
        stages: Sequence[StageSpan] = (),
    ) -> None:
        """See `Tracer`; call it in one thread."""
        from opentelemetry import trace

        if not context.flags & _SAMPLED:
            return
        now, clock = time.time_ns(), time.perf_counter()
        parent = trace.set_span_in_context(trace.INVALID_SPAN)
        if context.parent_id is not None:
            remote = trace.SpanContext(
                int(context.trace_id, 16),
                int(context.parent_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(context.flags),
            )
            parent = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        self._next_ids = int(context.trace_id, 16), int(context.span_id, 16)
        span = self._tracer.start_span(
            name,
            parent,
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=now - int(seconds * 1e9),
        )
        self._next_ids = (0, 0)
        for stage in stages:
            child = self._tracer.start_span(
                stage.name,
                trace.set_span_in_context(span),
                start_time=now - int((clock - stage.started) * 1e9),
            )
            child.end(now - int((clock - stage.ended) * 1e9))
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        span.end(now)

    def close(self) -> None:
        """Send what waits; a collector that does not answer is given up after three seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            logger.warning("traces were lost: no answer within %.0f s", _CLOSE_SECONDS)


def _logging_once(exporter: "SpanExporter", url: str) -> "SpanExporter":
    """An exporter that says once when the collector is gone, and once when it is back."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class LoggingExporter(SpanExporter):
        _is_failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result = exporter.export(spans)
            except Exception:  # noqa: BLE001 - whatever it is, the log hears of it here
                result = SpanExportResult.FAILURE
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self._is_failing:
                logger.warning("traces cannot be sent to %s and are dropped until they can", url)
            elif self._is_failing and not failed:
                logger.info("traces reach %s again", url)
            self._is_failing = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return LoggingExporter()
