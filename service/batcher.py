"""The queue between requests and engines.

There is no wait timer: an engine that is free takes what has gathered while it worked, so batches
are small when the service is idle and grow with the load. A batch holds images of one group (one
model, size and choice of layers, all of them with boxes of one kind or none), in order of arrival,
up to a budget of tokens, one of vectors of boxes, and one of time. The group whose first image has
waited longest goes first, so nothing starves, and every waiting image of that group may join it:
the window that is sorted by size is the whole queue, which admission bounds.

Dimension key: h, w = image in pixels, V = feature vectors of an image's boxes, N = patch tokens,
P = prefix tokens, R = register tokens, C = channels.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from service.boxes import Regions
from service.metrics import Metrics
from service.models import ServedModel


class EncodedLayer(NamedTuple):
    """What one layer of the model says about one image, on the CPU in the model's precision."""

    tokens_NC: Tensor | None  # None: nobody wants them, only boxes
    prefix_PC: Tensor
    registers_RC: Tensor | None  # None: not asked for, as is the next one
    spurious_N2: Tensor | None  # float32
    boxes_VC: Tensor | None  # of the image's regions; float32 if they are normalised


class EncodedImage(NamedTuple):
    """Features of one image, and what they took."""

    layers: tuple[EncodedLayer, ...]
    grid: tuple[int, int]
    queue_seconds: float
    forward_seconds: float  # of the whole batch


@dataclass(frozen=True, slots=True)
class EncodingPlan:
    """What the model is asked for; images that ask for the same can share a batch."""

    model: ServedModel
    size: tuple[int, int]  # (h, w) px
    layers: tuple[int, ...]
    register_width: int
    registers: bool = False
    spurious: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the image's tokens in all layers, in the model's precision."""
        encoder = self.model.encoder
        rows, columns = self.size[0] // encoder.patch_size, self.size[1] // encoder.patch_size
        vector_bytes = encoder.backbone.embed_dim * encoder.dtype.itemsize
        return len(self.layers) * rows * columns * vector_bytes


@dataclass(slots=True, eq=False)
class QueuedImage:
    """An image that waits for its features."""

    pixels_3HW: Tensor | bytes  # uint8, of any size; or a JPEG that the device decodes
    plan: EncodingPlan
    num_tokens: int
    regions: Regions | None = None  # boxes to cut out on the device
    wants_tokens: bool = True
    future: Future[EncodedImage] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)

    @property
    def num_box_vectors(self) -> int:
        """Feature vectors that its boxes ask for, in all layers."""
        return self.regions.num_vectors * len(self.plan.layers) if self.regions else 0

    @property
    def group(self) -> tuple[object, ...]:
        """Images of one group can share a batch."""
        kind = (self.regions.box_size, self.regions.normalize) if self.regions else None
        return self.plan, kind


class BatcherClosedError(Exception):
    """No engine will take the image any more."""


class Batcher:
    """A queue of images that hands out batches; safe to use from any thread."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        batch_tokens: int,
        batch_box_vectors: int,
        batch_seconds: float = math.inf,
        tokens_per_second: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """
        Args:
            batch_tokens: Most tokens in a batch.
            batch_box_vectors: Most feature vectors that the boxes of a batch may ask for.
            batch_seconds: Longest that a batch of several images should take.
            tokens_per_second: The rate of one engine now; 0 when it is not known.
        """
        self.batch_tokens = batch_tokens
        self.batch_box_vectors = batch_box_vectors
        self._batch_seconds = batch_seconds
        self._tokens_per_second = tokens_per_second
        self._metrics = metrics
        self._groups: dict[tuple[object, ...], deque[QueuedImage]] = {}
        self._num_images = 0
        self._num_tokens = 0
        self._changed = threading.Condition()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def submit(self, image: QueuedImage) -> Future[EncodedImage]:
        """Queue an image. Cancelling the future takes it out again, if no engine has begun on it.

        Raises:
            BatcherClosedError: after `close`.
        """
        assert image.num_tokens <= self.batch_tokens, "the request checks the size of its images"
        assert image.num_box_vectors <= self.batch_box_vectors, "the request counts its boxes"
        with self._changed:
            if self._is_closed:
                raise BatcherClosedError
            self._groups.setdefault(image.group, deque()).append(image)
            self._count(1, image.num_tokens)
            self._changed.notify()
        return image.future

    def next_batch(self, *, wait: bool = True) -> list[QueuedImage] | None:
        """Take a batch of images, after waiting for some if need be.

        Returns:
            None when the batcher is closed and empty, and without `wait` when it is empty.
        """
        with self._changed:
            while True:
                batch = self._take()
                if batch:
                    self._metrics.batch_images.observe(len(batch))
                    self._metrics.batch_tokens.observe(sum(image.num_tokens for image in batch))
                    return batch
                if self._is_closed or not wait:
                    return None
                self._changed.wait()

    def close(self) -> None:
        """Take no more images; those that wait are still handed out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def fail_waiting(self, error: Exception) -> None:
        """Answer everything that waits with `error`."""
        with self._changed:
            waiting = [image for images in self._groups.values() for image in images]
            self._groups.clear()
            self._count(-self._num_images, -self._num_tokens)
        for image in waiting:
            if image.future.set_running_or_notify_cancel():
                image.future.set_exception(error)

    def _take(self) -> list[QueuedImage]:
        """A batch; empty only when nothing waits."""
        batch: list[QueuedImage] = []
        while self._groups and not batch:
            group = min(self._groups, key=lambda group: self._groups[group][0].queued_at)
            batch = self._take_from(self._groups[group])
            if not self._groups[group]:
                del self._groups[group]
        return batch

    def _take_from(self, waiting: deque[QueuedImage]) -> list[QueuedImage]:
        batch: list[QueuedImage] = []
        tokens = box_vectors = 0
        rate = self._tokens_per_second() or math.inf
        budget = min(self.batch_tokens, rate * self._batch_seconds)
        while waiting:
            image = waiting[0]
            if batch and (
                tokens + image.num_tokens > budget
                or box_vectors + image.num_box_vectors > self.batch_box_vectors
            ):
                break
            waiting.popleft()
            self._count(-1, -image.num_tokens)
            if not image.future.set_running_or_notify_cancel():
                # A client that hung up, or whose deadline passed, cancelled its future: its image
                # must not cost a place.
                self._metrics.cancelled_images.inc()
                continue
            tokens += image.num_tokens
            box_vectors += image.num_box_vectors
            batch.append(image)
        return batch

    def _count(self, num_images: int, num_tokens: int) -> None:
        self._num_images += num_images
        self._num_tokens += num_tokens
        self._metrics.queue_images.set(self._num_images)
        self._metrics.queue_tokens.set(self._num_tokens)
