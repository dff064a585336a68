"""What lives as long as the process: settings, threads, queue, engines, and in which phase it is.

starting -> ready -> draining        (SIGTERM: no new requests, those in flight are finished)
any      -> failed                   (the model cannot be loaded, or an engine died)
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from backbone import DenseEncoder, open_model
from service.batcher import Batcher
from service.decoding import WorkerPool
from service.engine import Engine
from service.errors import DrainingError, NotReadyError
from service.metrics import Metrics
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "draining", "failed"]
_STOP_SECONDS = 5.0

OpenEncoder = Callable[[Settings, str], DenseEncoder]


class FeatureService:
    """Owns the parts of the service; routes read it, the server starts, drains and stops it."""

    def __init__(self, settings: Settings, open_encoder: OpenEncoder | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.batcher = Batcher(
            self.metrics,
            batch_tokens=settings.batch_tokens,
            batch_box_vectors=settings.max_box_vectors,
        )
        self.in_flight = 0
        self.failure: Exception | None = None
        self._is_draining = False
        self._pool: WorkerPool | None = None
        self._load = open_encoder or load_encoder
        self.engines = [
            Engine(
                device,
                partial(self._open, device),
                self.batcher,
                self.metrics,
                num_threads=settings.num_torch_threads,
                on_ready=self._engine_ready,
                on_failure=self._engine_failed,
            )
            for device in resolve_devices(settings.device)
        ]

    @property
    def phase(self) -> Phase:
        if self.failure is not None:
            return "failed"
        if self._is_draining:
            return "draining"
        return "ready" if all(engine.is_ready for engine in self.engines) else "starting"

    @property
    def pool(self) -> WorkerPool:
        assert self._pool is not None, "the service is started"
        return self._pool

    @property
    def encoder(self) -> DenseEncoder:
        """The model; every device has the same.

        Raises:
            NotReadyError: it is not loaded yet.
        """
        encoder = self.engines[0].encoder
        if encoder is None:
            raise NotReadyError("the model is being loaded; retry in a moment")
        return encoder

    def check_accepting(self) -> None:
        """
        Raises:
            NotReadyError, DrainingError: requests are not taken now.
        """
        phase = self.phase
        if phase == "draining":
            raise DrainingError("the service is shutting down; send the request to another replica")
        if phase == "failed":
            raise NotReadyError("the engine has failed; the service is about to exit")
        if phase == "starting":
            raise NotReadyError("the model is being loaded and warmed up; retry in a moment")

    def start(self) -> None:
        """Begin to load the model; returns at once. Call it in the event loop's thread."""
        # Small answers are converted in this thread, and it needs no team of its own for that.
        # Before the engines: a thread that sets its number of threads also sets the default for
        # threads that start later, and the engine's choice has to be the last.
        torch.set_num_threads(1)
        self._pool = WorkerPool(self.settings.num_decode_threads)
        for engine in self.engines:
            engine.start()

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True
        self.metrics.ready.set(0)
        logger.info("draining: %d requests in flight", self.in_flight)

    def stop(self) -> None:
        """End the threads; what still waits in the queue is encoded first."""
        self.batcher.close()
        for engine in self.engines:
            # One that is still loading has nobody to answer: not worth waiting for.
            engine.join(_STOP_SECONDS if engine.is_ready else 0.0)
        self.pool.close()

    def _open(self, device: str) -> DenseEncoder:
        encoder = self._load(self.settings, device)
        tokens, limit = encoder.num_tokens(*encoder.native_size), self.settings.max_image_tokens
        if tokens > limit:
            raise SettingsError(
                f"an image of the model's native size costs {tokens} tokens and "
                f"--max-image-tokens is {limit}: set it, and --batch-tokens, to {tokens} or more"
            )
        return encoder

    def _engine_ready(self) -> None:
        encoder = self.encoder
        self.metrics.show_model(
            digest=encoder.digest, backbone=encoder.backbone.name, precision=encoder.precision
        )
        self.metrics.ready.set(self.phase == "ready")

    def _engine_failed(self, error: Exception) -> None:
        self.failure = error
        self.metrics.ready.set(0)
        self.batcher.close()
        self.batcher.fail_waiting(
            NotReadyError("the engine has failed; the service is about to exit")
        )


def resolve_devices(device: str) -> list[str]:
    """`auto` is every CUDA device, or the CPU."""
    if device != "auto":
        return device.split(",")
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"]


def load_encoder(settings: Settings, device: str) -> DenseEncoder:
    """The model that the settings name, on `device`."""
    return open_model(
        settings.model,
        weights=settings.weights,
        random_weights=settings.random_weights,
        device=device,
        precision=settings.precision,
    )
