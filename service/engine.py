"""One thread per device that owns the model: it encodes batches and cuts boxes out of them.

Dimension key: B = images of a batch, h, w = image in pixels, V = feature vectors that an image is
answered with: its patch tokens, or those of its boxes, C = channels.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backbone import DenseEncoder, DenseFeatures
from backbone.errors import RefineryError
from kernels.dispatch import KernelError
from service.batcher import Batcher, EncodedImage, QueuedImage
from service.boxes import align
from service.errors import EncodingFailedError, NotReadyError
from service.metrics import Metrics
from service.warmup import WarmUp, warm_up

logger = logging.getLogger(__name__)


class Engine:
    """Loads a model in a thread of its own, warms it up, then encodes batches until closed."""

    def __init__(
        self,
        name: str,
        open_encoder: Callable[[], DenseEncoder],
        batcher: Batcher,
        metrics: Metrics,
        *,
        num_threads: int,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            open_encoder: Loads the model; called in the engine's thread.
            num_threads: Threads of one forward on a CPU.
            on_ready: Called in the engine's thread after the warm-up.
            on_failure: Called in the engine's thread when the model cannot be loaded or warmed
                up, or when the thread itself fails; the engine then takes no more batches.
        """
        self._open_encoder = open_encoder
        self._batcher = batcher
        self._metrics = metrics
        self._num_threads = num_threads
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self.encoder: DenseEncoder | None = None
        self.warm_up: WarmUp | None = None

    @property
    def is_ready(self) -> bool:
        """Loaded, warmed up and alive."""
        return self.warm_up is not None and self.is_alive

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs: it loads, encodes, or waits for images."""
        return self._thread.is_alive()

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            self.encoder = self._open_encoder()
            self.warm_up = warm_up(self.encoder, max_tokens=self._batcher.batch_tokens)
            self._on_ready()
            while batch := self._batcher.next_batch():
                self._answer_or_fail(batch)
        except (RefineryError, KernelError) as error:  # what the user can act on is told in words
            logger.error("the engine stopped: %s", error)
            self._on_failure(error)
        except Exception as error:  # whoever waits must hear of it, whatever it is
            logger.exception("the engine stopped")
            self._on_failure(error)

    def _answer_or_fail(self, batch: list[QueuedImage]) -> None:
        try:
            self._answer(batch)
        finally:
            # Only when the engine itself broke: nobody may be left waiting for a dead thread.
            for image in batch:
                if not image.future.done():
                    image.future.set_exception(NotReadyError("the engine has failed"))

    def _answer(self, batch: list[QueuedImage]) -> None:
        self._metrics.batch_images.observe(len(batch))
        self._metrics.batch_tokens.observe(sum(image.num_tokens for image in batch))
        try:
            encoded = self._encode(batch)
        except Exception as error:  # noqa: BLE001 - every waiter must be answered, whatever failed
            if len(batch) > 1:
                # One image may be the reason: alone, it fails alone.
                logger.warning("a batch of %d failed (%r): one by one now", len(batch), error)
                self._metrics.batch_retries.inc()
                for image in batch:
                    self._answer_alone(image)
            else:
                _fail(batch[0], error)
            return
        for image, result in zip(batch, encoded, strict=True):
            image.future.set_result(result)

    def _answer_alone(self, image: QueuedImage) -> None:
        try:
            image.future.set_result(self._encode([image])[0])
        except Exception as error:  # noqa: BLE001 - as above
            _fail(image, error)

    def _encode(self, batch: Sequence[QueuedImage]) -> list[EncodedImage]:
        assert self.encoder is not None
        started = time.perf_counter()
        images_B3hw = torch.stack([image.pixels_3hw for image in batch])
        layers = self.encoder.encode(images_B3hw, layers=batch[0].layers)
        outputs = [_copied_back(features, batch) for features in layers]
        ended = time.perf_counter()
        self._metrics.images.inc(len(batch))
        self._metrics.boxes.inc(sum(image.regions.num_boxes for image in batch if image.regions))
        return [
            EncodedImage(
                vectors_VC=[layer_vectors[index] for layer_vectors in outputs],
                grid=layers[0].grid,
                queue_seconds=started - image.queued_at,
                forward_seconds=ended - started,
                batch_images=len(batch),
            )
            for index, image in enumerate(batch)
        ]


def _copied_back(features: DenseFeatures, batch: Sequence[QueuedImage]) -> list[Tensor]:
    """`vectors_VC` of each image of a batch, on the CPU; of images with boxes only those."""
    regions = [image.regions for image in batch if image.regions is not None]
    return align(features, regions) if regions else list(features.tokens.cpu())


def _fail(image: QueuedImage, error: Exception) -> None:
    logger.error("an image of %s could not be encoded", image.group, exc_info=error)
    failed = EncodingFailedError(f"the model failed on the image: {type(error).__name__}")
    failed.__cause__ = error
    image.future.set_exception(failed)
