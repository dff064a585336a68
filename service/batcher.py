"""The queue between requests and engines.

There is no wait timer: an engine that is free takes what has gathered while it worked, so batches
are small when the service is idle and grow with the load. A batch holds images of one size and
one choice of layers, all of them with boxes of one kind or none, in order of arrival, up to a
budget of tokens and one of vectors of boxes; the oldest image always goes first, so nothing
starves.

Dimension key: h, w = image in pixels, V = feature vectors that an image is answered with: its patch
tokens, or those of its boxes, C = channels.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from service.boxes import Regions
from service.metrics import Metrics


class EncodedImage(NamedTuple):
    """Features of one image, or of its boxes if it has some, and what they took."""

    vectors_VC: list[Tensor]  # one per layer, on the CPU, in the model's precision
    grid: tuple[int, int]
    queue_seconds: float
    forward_seconds: float  # of the whole batch
    batch_images: int


@dataclass(slots=True, eq=False)
class QueuedImage:
    """An image that waits for its features."""

    pixels_3hw: Tensor
    layers: tuple[int, ...]
    num_tokens: int
    regions: Regions | None = None  # None: the whole image is wanted
    future: Future[EncodedImage] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)

    @property
    def num_box_vectors(self) -> int:
        """Feature vectors that its boxes ask for, in all layers."""
        return self.regions.num_vectors * len(self.layers) if self.regions else 0

    @property
    def group(self) -> tuple[object, ...]:
        """Images of one group can share a batch."""
        kind = (self.regions.box_size, self.regions.normalize) if self.regions else None
        return tuple(self.pixels_3hw.shape), self.layers, kind


class BatcherClosedError(Exception):
    """No engine will take the image any more."""


class Batcher:
    """A queue of images that hands out batches; safe to use from any thread."""

    def __init__(self, metrics: Metrics, *, batch_tokens: int, batch_box_vectors: int) -> None:
        """
        Args:
            batch_tokens: Most tokens in a batch.
            batch_box_vectors: Most feature vectors that the boxes of a batch may ask for.
        """
        self.batch_tokens = batch_tokens
        self.batch_box_vectors = batch_box_vectors
        self._metrics = metrics
        self._queue: deque[QueuedImage] = deque()
        self._queued_tokens = 0
        self._changed = threading.Condition()
        self._is_closed = False

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
            self._queue.append(image)
            self._count(image.num_tokens)
            self._changed.notify()
        return image.future

    def next_batch(self) -> list[QueuedImage] | None:
        """Wait for images and take a batch of them; None when the batcher is closed and empty."""
        with self._changed:
            while True:
                batch = self._take()
                if batch:
                    return batch
                if self._is_closed:
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
            waiting, self._queue = self._queue, deque()
            self._count(-self._queued_tokens)
        for image in waiting:
            if image.future.set_running_or_notify_cancel():
                image.future.set_exception(error)

    def _take(self) -> list[QueuedImage]:
        batch: list[QueuedImage] = []
        left_over: deque[QueuedImage] = deque()
        tokens = box_vectors = 0
        group = None
        while self._queue:
            image = self._queue.popleft()
            if group is not None and (
                image.group != group
                or tokens + image.num_tokens > self.batch_tokens
                or box_vectors + image.num_box_vectors > self.batch_box_vectors
            ):
                left_over.append(image)
                continue
            self._count(-image.num_tokens)
            if not image.future.set_running_or_notify_cancel():
                # A client that hung up cancelled its future: its image must not cost a place.
                self._metrics.cancelled_images.inc()
                continue
            group = image.group
            tokens += image.num_tokens
            box_vectors += image.num_box_vectors
            batch.append(image)
        self._queue = left_over
        return batch

    def _count(self, num_tokens: int) -> None:
        self._queued_tokens += num_tokens
        self._metrics.queue_tokens.set(self._queued_tokens)
        self._metrics.queue_images.set(len(self._queue))
