"""What lives as long as the process: settings, threads, queue, engines, and in which phase it is.

starting -> ready -> draining        (SIGTERM: no new requests, those in flight are finished)
any      -> failed                   (a model cannot be loaded, or an engine died or is stuck)
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

import torch

from backbone import find_devices
from service.admission import Admission, HeldBodies
from service.batcher import Batcher
from service.cache import FeatureCache, build_cache
from service.compiles import watch_compiles
from service.cores import Cores
from service.decoding import WorkerPool
from service.engine import Engine
from service.errors import DrainingError, NotReadyError
from service.metrics import Metrics
from service.models import ModelRegistry, OpenEncoder, ServedModel
from service.planning import Planner
from service.settings import Settings, SettingsError
from service.urls import UrlFetcher
from service.work import Workshop

logger = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "draining", "failed"]
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.1
# Hashing, reading headers and converting small arrays: short work, which must not queue behind
# decoding.
_NUM_HELPERS = 2


class FeatureService:
    """Owns the parts of the service; routes read it, the server starts, drains and stops it."""

    def __init__(self, settings: Settings, open_encoder: OpenEncoder | None = None) -> None:
        """
        Args:
            settings: What the operator chose.
            open_encoder: Loads a model for a device; default what the settings say.

        Raises:
            SettingsError: the cache, or a host of URLs, cannot be used as configured.
            DeviceError: a device is not here or cannot be used.
        """
        self.settings = settings
        self.metrics = Metrics()
        devices = find_devices(settings.device)
        self.registry = ModelRegistry(settings, devices, open_encoder)
        self.admission = Admission(
            self.metrics,
            queue_seconds=settings.queue_seconds,
            max_tokens=settings.max_queue_tokens,
            min_tokens=settings.max_image_tokens,
            num_devices=len(devices),
        )
        self.batcher = Batcher(
            self.metrics,
            batch_tokens=settings.batch_tokens,
            batch_box_vectors=settings.max_box_vectors,
            batch_seconds=settings.batch_seconds,
            tokens_per_second=self._engine_rate,
        )
        self.bodies = HeldBodies(settings.max_held_body_bytes)
        self.cache: FeatureCache = build_cache(settings, self.metrics.registry)
        self._fetcher = _fetcher(settings)
        self.in_flight = 0
        self.failure: Exception | None = None
        self._is_loaded = False
        self._is_draining = False
        self._decoders: WorkerPool | None = None
        self._helpers: WorkerPool | None = None
        self._planner: Planner | None = None
        self._workshop: Workshop | None = None
        self._end_watch: Callable[[], None] = lambda: None
        self.engines = [
            engine
            for index, device in enumerate(devices)
            for engine in self._make_engines(index, device)
        ]

    @property
    def phase(self) -> Phase:
        if self.failure is not None:
            return "failed"
        if self._is_draining:
            return "draining"
        return "ready" if self._is_loaded else "starting"

    @property
    def workshop(self) -> Workshop:
        assert self._workshop is not None, "the service is started"
        return self._workshop

    @property
    def planner(self) -> Planner:
        assert self._planner is not None, "the service is started"
        return self._planner

    @property
    def decoders(self) -> WorkerPool:
        """Threads for what takes the time of an image: decoding, principal components, boxes."""
        assert self._decoders is not None, "the service is started"
        return self._decoders

    @property
    def helpers(self) -> WorkerPool:
        """Threads for what is short, but too long for the event loop."""
        assert self._helpers is not None, "the service is started"
        return self._helpers

    @property
    def default_digest(self) -> str | None:
        """Digest of the default model's weights; None before it is loaded."""
        return self.registry.models[0].encoder.digest if self._is_loaded else None

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

    def check_health(self) -> None:
        """Give the service up if an engine is dead or stuck; called some times a second."""
        if self.failure is not None or not self._is_loaded or self.batcher.is_closed:
            return
        limit = self.settings.stuck_seconds
        for engine in self.engines:
            if engine.busy_seconds > limit:
                self.fail(RuntimeError(f"{engine.device} has worked {limit:g} s on one batch"))
            elif not engine.is_alive:
                self.fail(RuntimeError(f"the thread of {engine.device} has ended"))

    def fail(self, error: Exception) -> None:
        """Take the service for lost: everybody who waits hears it, and the process ends."""
        if self.failure is None:
            logger.error("the service has failed: %s", error)
            self.failure = error
        self.metrics.ready.set(0)
        self.batcher.close()
        answer = NotReadyError("the engine has failed; the service is about to exit")
        self.batcher.fail_waiting(answer)
        for engine in self.engines:
            engine.abandon(answer)

    def start(self) -> None:
        """Begin to load the models; returns at once. Call it in the event loop's thread."""
        # Small answers are converted in this thread, and it needs no team of its own for that.
        # Before the engines: a thread that sets its number of threads also sets the default for
        # threads that start later, and the engine's choice has to be the last.
        torch.set_num_threads(1)
        self._decoders = WorkerPool(self.settings.num_decode_threads)
        self._helpers = WorkerPool(_NUM_HELPERS)
        self._planner = Planner(
            self.settings,
            helpers=self._helpers,
            decoders=self._decoders,
            fetcher=self._fetcher,
        )
        self._workshop = Workshop(
            self.settings,
            batcher=self.batcher,
            admission=self.admission,
            cache=self.cache,
            decoders=self._decoders,
            metrics=self.metrics,
            resizes_on_device=all(engine.device.type == "cuda" for engine in self.engines),
        )
        self.cache.start()
        threading.Thread(target=self._load, name="loader", daemon=True).start()

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True
        self.metrics.ready.set(0)
        logger.info("draining: %d requests in flight", self.in_flight)

    async def stop(self) -> None:
        """End the threads; what still waits in the queue is encoded first."""
        self.batcher.close()
        # Together: the time that an operator gives the process does not count engines.
        deadline = time.monotonic() + _STOP_SECONDS
        for engine in self.engines:
            if engine.is_alive and not self.failure:
                engine.join(max(0.0, deadline - time.monotonic()))
        self._end_watch()
        await self.cache.close(_STOP_SECONDS)
        if self._fetcher is not None:
            self._fetcher.close()
        for pool in (self._decoders, self._helpers):
            if pool is not None:
                pool.close()

    async def load_model(self, name: str, spec: str) -> ServedModel:
        """Load another model and serve it, while the others are.

        Raises:
            ConflictError and what loading raises: see `ModelRegistry.load`.
        """

        def load() -> ServedModel:  # to its end, also when the client has left meanwhile
            model = self.registry.load(name, spec)
            self.show_models()
            return model

        return await asyncio.to_thread(load)

    def drop_model(self, name: str) -> None:
        """Serve a model no more.

        Raises:
            UnknownModelError, ConflictError: see `ModelRegistry.drop`.
        """
        self.registry.drop(name)
        self.show_models()

    def refresh_gauges(self) -> None:
        """Bring what is only read when somebody looks up to date."""
        self.metrics.admission_limit_tokens.set(self.admission.limit)
        if self._decoders is not None:
            self.metrics.pool_depth.set(self._decoders.depth)
        for engine in self.engines:
            if engine.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(engine.device)
                self.metrics.show_device_memory(
                    str(engine.device), free_bytes=free, total_bytes=total
                )

    def show_models(self) -> None:
        """Tell the metrics which models are served now."""
        self.metrics.show_models(
            (
                model.name,
                model.encoder.digest,
                model.encoder.backbone.name,
                model.encoder.precision,
            )
            for model in self.registry.models
        )

    def _check_stuck_seconds(self, tokens_per_second: float) -> None:
        tokens, limit = self.settings.max_image_tokens, self.settings.stuck_seconds
        # One engine of several is as much slower, and no rate is exact.
        seconds = tokens / tokens_per_second * len(self.engines)
        if 2 * seconds > limit:
            logger.warning(
                "an image of --max-image-tokens %d may take %.0f s here, and --stuck-seconds %g "
                "takes an engine for dead: lower the one or raise the other",
                tokens,
                seconds,
                limit,
            )

    def _engine_rate(self) -> float:
        """Tokens per second of one engine when all work."""
        return self.admission.tokens_per_second / len(self.engines)

    def _make_engines(self, index: int, device: str) -> list[Engine]:
        is_cpu = torch.device(device).type == "cpu"
        cores = Cores(self.settings.num_torch_threads)
        return [
            Engine(
                index,
                device,
                self.batcher,
                self.metrics,
                cores=cores,
                models=lambda: self.registry.models,
                on_batch=self.admission.observe,
                on_failure=self.fail,
            )
            for _ in range(self.settings.num_cpu_engines if is_cpu else 1)
        ]

    def _load(self) -> None:
        try:
            for name, spec in self.settings.models.items():
                model = self.registry.load(name, spec)
                self.admission.start_at(model.warm_up.tokens_per_second)
                self._check_stuck_seconds(model.warm_up.tokens_per_second)
            for engine in self.engines:
                engine.start()
            for engine in self.engines:
                while not engine.is_warm.wait(_POLL_SECONDS):
                    if not engine.is_alive:
                        return  # it has told why
        except Exception as error:  # noqa: BLE001 - whatever it is, the process must end and say so
            self.fail(error)
            return
        self.show_models()
        self._end_watch = watch_compiles(self.metrics.late_compiles.inc)
        self._is_loaded = True
        self.metrics.ready.set(self.phase == "ready")


def _fetcher(settings: Settings) -> UrlFetcher | None:
    if not settings.allow_url_hosts:
        return None
    try:
        return UrlFetcher(
            settings.allow_url_hosts,
            max_bytes=settings.max_body_bytes,
            seconds=settings.url_seconds,
            max_redirects=settings.max_url_redirects,
        )
    except ValueError as error:
        raise SettingsError(f"--allow-url-hosts: {error}") from None
