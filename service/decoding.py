"""Pixels of the images of a request, in threads that the event loop never waits for.

Dimension key: H, W = the upright image in pixels, h, w = the size that it is encoded at.
"""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from backbone import preprocess
from service.priority import lower_priority

T = TypeVar("T")

# glibc keeps what an image of this size leaves free, once per thread, for good. Below it, keeping
# is right: fixed trim or mmap thresholds instead cost a forward 40 % in page faults.
_LARGE_BYTES = 6_000_000
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class DecodedImage(NamedTuple):
    """One image, ready for the model, or for a device that resizes it."""

    pixels_3hw: Tensor  # uint8, of size `original` where resizing is left to the device
    original: tuple[int, int]  # (H, W) px
    resized: tuple[int, int]  # (h, w) px


class WorkerPool:
    """A bounded number of threads for what would hold up the event loop."""

    def __init__(self, num_threads: int) -> None:
        # Every thread that calls a parallel torch operation gets a team of its own: one image
        # per thread uses the cores better than several threads per image.
        ready = threading.Barrier(num_threads + 1)
        self._executor = ThreadPoolExecutor(num_threads, "worker")
        self._lock = threading.Lock()
        self._depth = 0
        for _ in range(num_threads):
            self._executor.submit(_prepare_thread, ready)
        ready.wait()

    @property
    def depth(self) -> int:
        """Pieces of work that wait or run, those among them whose caller has gone too."""
        return self._depth

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work` done in a thread; work that has not begun is dropped on cancel."""
        with self._lock:
            self._depth += 1
        try:
            future = self._executor.submit(work, *arguments)
        except RuntimeError:  # the pool is closed
            self._forget()
            raise
        # Of the thread's future and not of the loop's: that one is done when its caller leaves.
        future.add_done_callback(self._forget)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _forget(self, _: "Future[T] | None" = None) -> None:
        with self._lock:
            self._depth -= 1


def _prepare_thread(ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    lower_priority()
    ready.wait()


def decode_resized(
    data: bytes,
    choose_size: Callable[[int, int], tuple[int, int]],
    max_pixels: int,
    *,
    resize_on_device: bool = False,
) -> DecodedImage:
    """Decode an image and resize it to `choose_size(H, W)`.

    Args:
        data: The whole file.
        choose_size: From (H, W) of the upright image to (h, w), in pixels.
        max_pixels: Largest number of pixels that the header may declare.
        resize_on_device: Leave the pixels as they are for `preprocess.resize_image` on a CUDA
            device. Those that CUDA cannot resize at once are resized here all the same.

    Raises:
        backbone.errors.ImageError: the image cannot be decoded, or not at that size.
        ServiceError: what `choose_size` raises.
    """
    pixels_3HW = preprocess.decode_image(data, max_pixels=max_pixels)
    original = (pixels_3HW.shape[1], pixels_3HW.shape[2])
    resized = choose_size(*original)
    if resize_on_device and preprocess.can_resize_on_cuda(original, resized):
        return DecodedImage(pixels_3HW, original, resized)
    image = DecodedImage(preprocess.resize_image(pixels_3HW, resized), original, resized)
    if pixels_3HW.numel() > _LARGE_BYTES:
        del pixels_3HW
        _return_memory()
    return image


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    if _malloc_trim is not None:
        _malloc_trim(0)
