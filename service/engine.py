"""Threads that take batches from the queue and answer them: one per CUDA device, several per CPU.

On a CUDA device the thread launches a batch, forms and launches the next one while that runs, and
only then waits for the first one's features, which come back through pinned memory on a stream of
their own. On a CPU a batch is done when its forward returns.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from typing import NamedTuple

import torch

from backbone.errors import ImageError
from service.batcher import Batcher, EncodedImage, QueuedImage
from service.cores import Cores
from service.encoding import BatchEncoder, BatchOutput, own
from service.errors import EncodingFailedError, NotReadyError
from service.metrics import Metrics
from service.models import ServedModel
from service.priority import lower_priority

logger = logging.getLogger(__name__)

_FATAL_TEXTS = ("CUDA error", "device-side assert", "cuDNN error", "CUBLAS_STATUS")


class EngineFailedError(Exception):
    """The device cannot be used any more; only a new process can."""


class _Launched(NamedTuple):
    batch: list[QueuedImage]
    output: BatchOutput
    started: float


class Engine:
    """Encodes batches on one device until the batcher is closed and empty."""

    def __init__(
        self,
        index: int,
        device: str,
        batcher: Batcher,
        metrics: Metrics,
        *,
        cores: Cores,
        models: Callable[[], Sequence[ServedModel]],
        on_batch: Callable[[int, float], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            index: Of the device among those of a `ServedModel`.
            cores: What the forwards of a CPU share; those of a CUDA device need few.
            models: What is served when the thread begins; it warms itself up with them.
            on_batch: Called after each batch with its tokens and the seconds of the device that
                it took.
            on_failure: Called in the engine's thread when it fails for good; the engine then
                takes no more batches.
        """
        self.device = torch.device(device)
        self._batcher = batcher
        self._metrics = metrics
        self._cores = cores
        self._models = models
        self._on_batch = on_batch
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name=f"engine-{device}", daemon=True)
        self._encoder = BatchEncoder(index, self.device, metrics)
        self._working: list[_Launched | list[QueuedImage]] = []
        self._busy_since: float | None = None
        self._counted_since = 0.0
        self._busy_total = metrics.add_engine(device)
        self.is_warm = threading.Event()
        self._last_end = 0.0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs: it encodes, or waits for images."""
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """How long it has been working without finishing a batch; 0 when it waits for images."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)

    def abandon(self, error: Exception) -> None:
        """Answer what the engine works on with `error`, from another thread, when it is stuck."""
        for work in list(self._working):
            for image in work.batch if isinstance(work, _Launched) else work:
                _fail(image, error)

    def _run(self) -> None:
        try:
            lower_priority()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self._encoder.warm_up(self._models())
            self.is_warm.set()
            self._serve()
        except Exception as error:  # whoever waits must hear of it, whatever it is
            logger.exception("the engine on %s stopped", self.device)
            self._on_failure(error)
            self.abandon(NotReadyError("the engine has failed; the service is about to exit"))

    def _serve(self) -> None:
        launched: _Launched | None = None
        while True:
            batch = self._batcher.next_batch(wait=launched is None)
            is_empty = batch is None
            following = self._launch(batch) if batch else None
            # Kept while the next one is waited for, it would keep its model, which may be dropped.
            batch = None
            if launched is not None:
                self._finish(launched)
            elif is_empty:
                return
            launched = following

    def _launch(self, batch: list[QueuedImage]) -> _Launched | None:
        """Begin on a batch; None when it is already answered."""
        started = time.perf_counter()
        if not self._working:
            self._busy_since = self._counted_since = started
        self._working.append(batch)
        torch.set_num_threads(self._cores.enter())
        try:
            launched = _Launched(batch, self._encoder.encode(batch), started)
        except Exception as error:  # noqa: BLE001 - every waiter must be answered, whatever failed
            self._answer_singly(batch, error)
            self._done(batch)
            return None
        self._working[-1] = launched
        if launched.output.copied is not None:
            return launched
        self._finish(launched)
        return None

    def _finish(self, launched: _Launched) -> None:
        batch = launched.batch
        try:
            encoded = _split(launched)
        except Exception as error:  # noqa: BLE001 - as above
            self._answer_singly(batch, error)
        else:
            for image, result in zip(batch, encoded, strict=True):
                _answer(image, result)
            self._count(batch)
            ended = time.perf_counter()
            # Batches overlap on a CUDA device: each has it since the one before has ended.
            seconds = ended - max(launched.started, self._last_end)
            self._last_end = ended
            if self.device.type == "cpu":
                seconds /= self._cores.num_busy  # others have had their share of the device
            self._on_batch(sum(image.num_tokens for image in batch), seconds)
        self._done(launched)

    def _count(self, encoded: Sequence[QueuedImage]) -> None:
        self._metrics.images.inc(len(encoded))
        self._metrics.boxes.inc(sum(image.regions.num_boxes for image in encoded if image.regions))

    def _done(self, work: _Launched | list[QueuedImage]) -> None:
        self._cores.leave()
        self._working = [other for other in self._working if other is not work]
        now = time.perf_counter()
        self._busy_total.inc(now - self._counted_since)
        self._counted_since = now
        self._busy_since = now if self._working else None

    def _answer_singly(self, batch: list[QueuedImage], error: Exception) -> None:
        """Try the images of a failed batch one by one, so that only the guilty one fails.

        Raises:
            EngineFailedError: the device is lost.
        """
        self._check_device(error)
        if len(batch) == 1:
            _fail_encoding(batch[0], error)
            return
        logger.warning("a batch of %d failed (%r): one by one now", len(batch), error)
        self._metrics.batch_retries.inc()
        for image in batch:
            self._busy_since = time.perf_counter()  # each is a batch of its own
            try:
                launched = _Launched([image], self._encoder.encode([image]), time.perf_counter())
                _answer(image, _split(launched)[0])
                self._count([image])
            except Exception as failure:  # noqa: BLE001 - as above
                self._check_device(failure)
                _fail_encoding(image, failure)

    def _check_device(self, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._metrics.out_of_memory.inc()
            torch.cuda.empty_cache()
        elif is_fatal(error):
            raise EngineFailedError(f"{self.device} is lost: {error}") from error


def is_fatal(error: Exception) -> bool:
    """Whether an error means that the device's context is lost, so that nothing will work again."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _FATAL_TEXTS)
    )


def _split(launched: _Launched) -> list[EncodedImage]:
    batch, output, started = launched
    output.wait()
    ended = time.perf_counter()
    return [
        EncodedImage(
            layers=tuple(own(layer[index]) for layer in output.layers),
            grid=output.grid,
            queue_seconds=started - image.queued_at,
            forward_seconds=ended - started,
        )
        for index, image in enumerate(batch)
    ]


def _answer(image: QueuedImage, result: EncodedImage) -> None:
    try:
        image.future.set_result(result)
    except InvalidStateError:
        logger.warning("an image was answered after its engine had been given up")


def _fail(image: QueuedImage, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # answered already
        image.future.set_exception(error)


def _fail_encoding(image: QueuedImage, error: Exception) -> None:
    if isinstance(error, ImageError):
        _fail(image, error)  # the file's fault, found where the device decodes it
        return
    logger.error("an image of %s could not be encoded", image.plan.size, exc_info=error)
    failed = EncodingFailedError(f"the model failed on the image: {type(error).__name__}")
    failed.__cause__ = error
    _fail(image, failed)
