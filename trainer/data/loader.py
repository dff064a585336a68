"""Batches that are ready in time: decoded ahead by threads, the same for any number of processes.

Images come as one endless stream, epoch after epoch, each in an order of its own that follows from
the seed. A position in that stream is all that a checkpoint needs.

Every forward of all processes together takes the next `world_size * batch_size` images, and process
`rank` the `rank`-th part of them. What an optimiser step sees follows from the position and from
how many images it takes, not from how many processes take them, and a run goes on with another
number of processes where it stopped. Where there are several sizes, each optimiser step has one of
them, which follows from the seed and the step's position.

Dimension key: B = images, S = side in pixels, H, W = height and width before the resize.
"""

import functools
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from backbone.errors import ImageError
from backbone.preprocess import decode_image, load_image, resize_image
from trainer.config import DataSection
from trainer.data.sources import Source
from trainer.errors import DataError

logger = logging.getLogger(__name__)

# Files tried in the place of an unreadable one before the images count as unreadable altogether.
_MAX_TRIES = 100
# Images whose decoding time says how fast the loader is.
_TIMED = 512
_NAMED = 3


class Batch(NamedTuple):
    """`images` uint8 [B, 3, S, S]; `position` in the stream behind this batch of all processes."""

    images: Tensor
    position: int


@dataclass
class BadImages:
    """What is done about files that cannot be read: stop, or skip and remember them.

    Attributes:
        skip: Go on without them.
        max_share: Largest share of the images that may be unreadable; one image always may.
        paths: Those met so far.
    """

    skip: bool
    max_share: float = 1.0
    paths: set[Path] = field(default_factory=set)

    def meet(self, path: Path, error: Exception, *, of: int | None = None) -> None:
        """Note an unreadable file, one of `of` images.

        Raises:
            DataError: they are not to be skipped, or there are too many.
        """
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        if not self.skip:
            raise DataError(
                f"unreadable image {message}; remove it, or skip such files with --skip-bad-images"
            ) from error
        if path not in self.paths:
            logger.warning("skipped unreadable image %s", message)
            self.paths.add(path)
        if of is not None and len(self.paths) > max(1, self.max_share * of):
            named = ", ".join(map(str, sorted(self.paths)[:_NAMED]))
            raise DataError(
                f"{len(self.paths)} of {of} images are unreadable, more than data.max_bad_share="
                f"{self.max_share:g} allows, among them {named}; mend or remove them, or raise it"
            ) from error


def square_image(path: Path, *, size: int, section: DataSection) -> Tensor:
    """Read one image file as uint8 [3, size, size]."""
    pixels_3HW = load_image(path, max_pixels=section.max_pixels)
    return resize_image(_cut(pixels_3HW, section), (size, size)).contiguous()


def source_image(source: Source, index: int, *, size: int, section: DataSection) -> Tensor:
    """Read one image of a source as uint8 [3, size, size].

    Raises:
        ImageError, OSError: it cannot be read.
        DataError: see `Source.read`.
    """
    pixels_3HW = decode_image(source.read(index), max_pixels=section.max_pixels)
    return resize_image(_cut(pixels_3HW, section), (size, size)).contiguous()


def _cut(pixels_3HW: Tensor, section: DataSection) -> Tensor:
    if section.fit == "stretch":
        return pixels_3HW
    cropped: Tensor = transforms.center_crop(pixels_3HW, [min(pixels_3HW.shape[-2:])] * 2)
    return cropped


class _Loaded(NamedTuple):
    """What a thread made for one place in the stream."""

    pixels_3HW: Tensor | None
    failed: list[tuple[Path, Exception]]
    seconds: float
    cpu_seconds: float


class Batches(Iterator[Batch]):
    """Endless batches of `section.batch_size` images from `position` on; close it after use.

    In the place of an unreadable image stands the one that comes half an epoch later in the same
    order, so that positions do not depend on which process met it.

    Args:
        source: Images.
        section: Settings.
        size: Side of the images in pixels, where it is not one of `section.other_sizes`.
        seed: Of the order, and of the choice of sizes.
        bad: What is done about unreadable images.
        position: Images of the stream that all processes took before.
        rank, world_size: Which part of every batch of all processes this one takes.
        device: Where the images go, and are resized if `section.resize` says so.

    Attributes:
        wait_seconds: Time spent in waiting for images so far.
    """

    def __init__(
        self,
        source: Source,
        section: DataSection,
        *,
        size: int,
        seed: int,
        bad: BadImages,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.wait_seconds = 0.0
        self._source, self._section, self._bad = source, section, bad
        self._sizes, self._seed = (size, *section.other_sizes), seed
        self._device = device or torch.device("cpu")
        self._stride = section.batch_size * world_size  # images of a batch of all processes
        self._start, self._offset = position, rank * section.batch_size
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: source.order(epoch, seed))
        self._pending: deque[Future[_Loaded]] = deque()
        self._ahead = position  # start of the batch of all processes that is to be decoded next
        self._timed: deque[tuple[float, float]] = deque(maxlen=_TIMED)
        self._pool = ThreadPoolExecutor(section.workers, thread_name_prefix="images")

    @property
    def loader_rate(self) -> float:
        """Images per second that this process's threads could decode, as the last ones went.

        Limited by the threads and the time of each image, and by the cores that this process has
        and the processor time of each image. Infinite before the first image.
        """
        if not self._timed:
            return math.inf
        seconds = statistics.fmean(wall for wall, _ in self._timed)
        cpu_seconds = statistics.fmean(cpu for _, cpu in self._timed)
        return 1 / max(seconds / self._section.workers, cpu_seconds / _cores(), 1e-9)

    def close(self) -> None:
        """Stop decoding."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: an unreadable file that is not to be skipped, or too many of them.
        """
        started = time.perf_counter()
        while len(self._pending) < 2 * self._section.batch_size + self._section.workers:
            self._submit()
        size = self._size_at(self._start)
        images = [self._take() for _ in range(self._section.batch_size)]
        self._start += self._stride
        batch = Batch(self._gather(images, size), self._start)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _size_at(self, position: int) -> int:
        """Side of the images of the optimiser step that a batch of all processes belongs to."""
        step = position // (self._stride * self._section.accumulate)
        generator = torch.Generator().manual_seed((self._seed << 24) + step)
        return self._sizes[int(torch.randint(len(self._sizes), (), generator=generator))]

    def _submit(self) -> None:
        first, size = self._ahead + self._offset, self._size_at(self._ahead)
        for place in range(first, first + self._section.batch_size):
            epoch, index = divmod(place, len(self._source))
            self._pending.append(self._pool.submit(self._load, self._order(epoch), index, size))
        self._ahead += self._stride

    def _take(self) -> Tensor:
        loaded = self._pending.popleft().result()
        for path, error in loaded.failed:
            self._bad.meet(path, error, of=len(self._source))
        if loaded.pixels_3HW is None:
            path, error = loaded.failed[0]
            raise DataError(
                f"not one of {len(loaded.failed)} images could be read, among them {path}"
            ) from error
        self._timed.append((loaded.seconds, loaded.cpu_seconds))
        return loaded.pixels_3HW

    def _load(self, order: list[int], index: int, size: int) -> _Loaded:
        """In a thread: the image at a place of an epoch, or the first readable one instead."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        failed: list[tuple[Path, Exception]] = []
        pixels_3HW = None
        tries = min(len(order), _MAX_TRIES) if self._bad.skip else 1
        for number in range(tries):
            place = index if number == 0 else index + len(order) // 2 + number - 1
            file = order[place % len(order)]
            try:
                pixels_3HW = self._decode(file, size)
                break
            except (ImageError, OSError) as error:
                failed.append((self._source.path(file), error))
        seconds, cpu_seconds = time.perf_counter() - started, time.thread_time() - cpu_started
        return _Loaded(pixels_3HW, failed, seconds, cpu_seconds)

    def _decode(self, file: int, size: int) -> Tensor:
        """An image at its size; or as it was decoded, if the device is to resize it and it is not
        more than twice as large: what goes to the device is bounded."""
        section = self._section
        if section.resize == "host":
            return source_image(self._source, file, size=size, section=section)
        pixels_3HW = decode_image(self._source.read(file), max_pixels=section.max_pixels)
        pixels_3HW = _cut(pixels_3HW, section)
        if max(pixels_3HW.shape[-2:]) > 2 * size:
            pixels_3HW = resize_image(pixels_3HW, (size, size))
        return pixels_3HW

    def _gather(self, images: list[Tensor], size: int) -> Tensor:
        """The batch on the device, by one copy."""
        pin = self._device.type == "cuda"
        if self._section.resize == "host":
            batch = torch.empty(len(images), 3, size, size, dtype=torch.uint8, pin_memory=pin)
            return torch.stack(images, out=batch).to(self._device, non_blocking=True)
        lengths = [image.numel() for image in images]
        flat = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=pin)
        # Channels last, as decoded: parting the channels would take as long as the resize.
        for part, image in zip(torch.split(flat, lengths), images, strict=True):
            part.view(*image.shape[1:], 3).copy_(image.permute(1, 2, 0))
        parts = torch.split(flat.to(self._device, non_blocking=True), lengths)
        resized = [
            resize_image(part.view(*image.shape[1:], 3).permute(2, 0, 1), (size, size))
            for part, image in zip(parts, images, strict=True)
        ]
        return torch.stack(resized).contiguous()


def _cores() -> float:
    """Cores that this process may use, shared with the others that torchrun started here."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cores / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
