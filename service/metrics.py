"""Prometheus metrics, all with the prefix `refinery_`, base units and bounded labels."""

from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

Stage = Literal["read", "cache", "decode", "queue", "forward", "encode"]
STAGES: tuple[Stage, ...] = ("read", "cache", "decode", "queue", "forward", "encode")

# Steps of about 1.6 from 1 ms, where a small model answers, to 30 s, where clients give up.
_SECONDS = (
    0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.15, 0.25, 0.4,
    0.63, 1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 16.0, 30.0,
)  # fmt: skip
_ALERTED_STATUSES = ("200", "429", "500", "503", "504")
_ALERTED_CODES = ("internal", "encoding_failed")
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_TOKENS = tuple(256 * 2**power for power in range(12))


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        # Without it every series has a twin `_created` that says when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="refinery", registry=self.registry)
        self.requests = self._counter("requests", "Requests answered", ("route", "status"))
        self.errors = self._counter("errors", "Error answers", ("code",))
        # A series that begins at its first failure has no increase there, and no alert sees it.
        for status in _ALERTED_STATUSES:
            self.requests.labels("/features", status)
        for code in _ALERTED_CODES:
            self.errors.labels(code)
        self.abandoned = self._counter("abandoned_requests", "Requests whose client hung up")
        self.images = self._counter("images", "Images encoded")
        self.boxes = self._counter("boxes", "Boxes cut out of encoded images")
        self.cancelled_images = self._counter(
            "cancelled_images", "Images taken out of the queue because their request ended"
        )
        self.coalesced_images = self._counter(
            "coalesced_images", "Images that joined the computation of an identical one"
        )
        self.not_modified = self._counter(
            "not_modified", "Requests answered with 304, because the client has the answer"
        )
        self.batch_retries = self._counter(
            "batch_retries", "Batches that failed and were tried again image by image"
        )
        self.out_of_memory = self._counter(
            "out_of_memory", "Batches that did not fit the device's memory"
        )
        self.padding_tokens = self._counter(
            "padding_tokens", "Tokens computed in vain to fill up a recorded batch"
        )
        self.late_compiles = self._counter(
            "late_compiles", "Kernels compiled after the warm-up, while a request waited"
        )
        self.rejected_tokens = self._counter(
            "rejected_tokens", "Tokens of requests that were refused because too much was waiting"
        )
        self.admitted_tokens = self._gauge(
            "admitted_tokens", "Tokens of requests that are being decoded, wait or are encoded"
        )
        self.admission_limit_tokens = self._gauge(
            "admission_limit_tokens", "Most tokens that may be admitted at a time"
        )
        self.tokens_per_second = self._gauge(
            "tokens_per_second", "Running mean of the rate of all engines"
        )
        self.pool_depth = self._gauge(
            "decode_pool_depth", "Pieces of work in the decoding threads, queued or running"
        )
        self.in_flight = self._gauge("requests_in_flight", "Feature requests being worked on")
        self.queue_images = self._gauge("queue_images", "Images waiting for an engine")
        self.queue_tokens = self._gauge("queue_tokens", "Tokens waiting for an engine")
        self.ready = self._gauge("ready", "1 when requests are taken")
        self.request_seconds = self._histogram(
            "request_seconds",
            "Feature request, headers to end of answer",
            _SECONDS,
        )
        self.batch_images = self._histogram("batch_images", "Images in a batch", _IMAGES)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens in a batch", _TOKENS)
        self.body_bytes = self._counter("received_bytes", "Bytes of request bodies read")
        self._stages = Histogram(
            "refinery_stage_seconds",
            "Time of a feature request in one stage",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds: Mapping[Stage, Histogram] = {
            stage: self._stages.labels(stage) for stage in STAGES
        }
        self._model = self._gauge(
            "model_info", "Always 1; what is served", ("model", "digest", "backbone", "precision")
        )
        self._device_memory = self._gauge(
            "device_memory_bytes", "Memory of the CUDA device", ("device", "state")
        )
        self._engines = self._gauge("engines", "Forwards that may run at a time", ("device",))
        self._engine_busy = self._counter(
            "engine_busy_seconds", "Time that engines spent on batches, added up", ("device",)
        )
        self._build = self._gauge(
            "build_info", "Always 1; what runs", ("version", "python", "torch", "cuda")
        )

    def add_engine(self, device: str) -> Counter:
        """Count an engine on `device`; returns where the seconds go that it is busy."""
        self._engines.labels(device).inc()
        return self._engine_busy.labels(device)

    def show_build(self, *, version: str, python: str, torch: str, cuda: str) -> None:
        """Versions of the project and of what it stands on."""
        self._build.labels(version, python, torch, cuda).set(1)

    def show_models(self, models: Iterable[tuple[str, str, str, str]]) -> None:
        """Name, digest, backbone and precision of each model that is served."""
        self._model.clear()
        for labels in models:
            self._model.labels(*labels).set(1)

    def show_device_memory(self, device: str, *, free_bytes: int, total_bytes: int) -> None:
        """What is taken on a CUDA device, by whomever, and what is left."""
        self._device_memory.labels(device, "free").set(free_bytes)
        self._device_memory.labels(device, "used").set(total_bytes - free_bytes)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"refinery_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"refinery_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"refinery_{name}", text, buckets=buckets, registry=self.registry)
