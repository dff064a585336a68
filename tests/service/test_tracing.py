import builtins
import importlib.util
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx2 as httpx
import pytest

from service.settings import Settings, SettingsError
from service.tracing import OpenTelemetryTracer, StageSpan, open_tracer, trace_context
from tests.service.small_service import running, small_app

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_a_valid_traceparent_is_continued_with_a_span_of_our_own():
    context = trace_context([PARENT])

    assert (context.trace_id, context.parent_id, context.flags) == (TRACE, SPAN, 1)
    assert context.span_id != SPAN
    assert context.header == f"00-{TRACE}-{context.span_id}-01"


def test_a_later_version_is_read_as_far_as_it_is_known():
    context = trace_context([f"cc-{TRACE}-{SPAN}-ff-what-comes-next"])

    assert (context.trace_id, context.flags) == (TRACE, 1)
    assert context.header.startswith("00-")


@pytest.mark.parametrize(
    "traceparents",
    [
        [],
        [""],
        ["nonsense"],
        [PARENT.upper()],
        [PARENT + "-more"],
        [PARENT + "0"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-0g"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [PARENT + "\n"],
        [PARENT, PARENT],
    ],
)
def test_without_a_valid_traceparent_a_new_trace_begins(traceparents):
    context = trace_context(traceparents)

    assert context.trace_id != TRACE
    assert (context.parent_id, context.flags) == (None, 0)
    assert trace_context([context.header]).trace_id == context.trace_id


def test_a_new_trace_is_marked_as_recorded_where_it_is():
    assert trace_context([], samples=True).header.endswith("-01")
    assert trace_context([f"00-{TRACE}-{SPAN}-00"], samples=True).header.endswith("-00")


def test_nothing_is_traced_without_an_endpoint():
    assert open_tracer(Settings(model="m"), "1") is None


def test_an_endpoint_without_the_extra_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(SettingsError, match=r"pip install 'vit-refinery\[otel\]'"):
        open_tracer(Settings(model="m", otlp_endpoint="http://127.0.0.1:1"), "1")


def test_no_module_of_opentelemetry_is_loaded_without_an_endpoint(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *arguments, **options):
        assert not name.startswith("opentelemetry")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)

    open_tracer(Settings(model="m"), "1")
    trace_context([PARENT])


class Collector:
    """Takes traces over HTTP, as an OpenTelemetry collector does."""

    def __init__(self):
        self.spans = []
        self.resources = []
        self.paths = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                collector.take(self.path, self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def take(self, path, body):
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
        self.paths.append(path)
        for resource in request.resource_spans:
            self.resources.append(attributes_of(resource.resource))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes_of(message):
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in message.attributes
    }


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.stop()


def record(tracer, context, **changes):
    options = {"seconds": 0.5, "attributes": {"refinery.images": 3}, "failed": False} | changes
    tracer.record(context, "POST /features", **options)


def test_a_request_becomes_a_span_of_the_callers_trace_with_its_stages_below(collector):
    tracer = OpenTelemetryTracer(collector.url, "1.2")
    context = trace_context([PARENT])
    now = time.perf_counter()

    record(tracer, context, stages=[StageSpan("decode", now - 0.4, now - 0.3)])
    tracer.close()

    spans = {span.name: span for span in collector.spans}
    request, stage = spans["POST /features"], spans["decode"]
    assert request.trace_id.hex() == stage.trace_id.hex() == TRACE
    assert request.span_id.hex() == context.span_id
    assert request.parent_span_id.hex() == SPAN
    assert stage.parent_span_id == request.span_id
    assert stage.span_id != request.span_id
    assert attributes_of(request) == {"refinery.images": 3}
    assert request.end_time_unix_nano - request.start_time_unix_nano == 500_000_000
    assert abs(stage.end_time_unix_nano - stage.start_time_unix_nano - 1e8) < 1e4
    assert request.start_time_unix_nano < stage.start_time_unix_nano
    assert collector.paths == ["/v1/traces"]
    assert collector.resources[0]["service.name"] == "vit-refinery"
    assert collector.resources[0]["service.version"] == "1.2"


def test_a_new_trace_is_sent_under_the_id_that_the_log_has(collector):
    tracer = OpenTelemetryTracer(collector.url + "/v1/traces", "1")
    context = trace_context([], samples=True)

    record(tracer, context, failed=True)
    tracer.close()

    (span,) = collector.spans
    assert (span.trace_id.hex(), span.span_id.hex()) == (context.trace_id, context.span_id)
    assert span.parent_span_id == b""
    assert span.status.code == 2
    assert collector.paths == ["/v1/traces"]


def test_a_trace_that_the_caller_does_not_record_is_not_sent(collector):
    tracer = OpenTelemetryTracer(collector.url, "1")

    record(tracer, trace_context([f"00-{TRACE}-{SPAN}-00"], samples=True))
    tracer.close()

    assert collector.spans == []


def test_a_dead_collector_costs_little_and_is_logged_once(caplog):
    tracer = OpenTelemetryTracer("http://127.0.0.1:9", "1")
    caplog.set_level(logging.INFO)

    started = time.perf_counter()
    for _ in range(5000):
        record(tracer, trace_context([], samples=True))
    seconds = time.perf_counter() - started
    closing = time.perf_counter()
    tracer.close()

    assert seconds < 5
    assert time.perf_counter() - closing < 4
    messages = [entry.getMessage() for entry in caplog.records]
    assert sum("cannot be sent to http://127.0.0.1:9/v1/traces" in line for line in messages) <= 1
    assert 1 <= len(messages) <= 2, messages


def test_a_served_request_reaches_the_collector_under_the_ids_of_its_answer(collector):
    app = small_app(otlp_endpoint=collector.url)

    with running(app) as server:
        answer = httpx.post(server.url + "/features", headers={"traceparent": PARENT})
        httpx.get(server.url + "/info")
    app.state.tracer.close()

    (span,) = collector.spans
    assert answer.headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert span.trace_id.hex() == TRACE
    assert attributes_of(span)["http.response.status_code"] == 200
