"""Crops and their served features, ready before they are needed.

Dimension key: B = images, S = side in pixels, N = patches, C = channels of the features.
"""

import contextlib
import itertools
import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from service.client import FeatureClient, FeatureError


@dataclass(frozen=True)
class Example:
    """A crop for the transformer, and the service's features of it."""

    pixels_3SS: Tensor  # in [-1, 1]
    features_NC: Tensor


class Prefetcher:
    """Examples from random crops of photographs, as fast as the service answers.

    A thread keeps the client's requests in flight, and stops for a while when `ahead` examples
    wait: a fast service does not fill the memory, a slow one makes `take` wait.
    """

    def __init__(
        self, client: FeatureClient, photographs: list[Path], *, side: int, view: int, ahead: int
    ) -> None:
        self._client = client
        self._photographs = photographs
        self._side, self._view = side, view
        self._examples: queue.Queue[Example | Exception] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._crops: dict[int, Image.Image] = {}  # whose features are on their way
        self._thread = threading.Thread(target=self._fill, name="prefetcher")
        self._thread.start()

    def take(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The next batch: pixels [B, 3, S, S] and features [B, N, C].

        Raises:
            FeatureError: the service failed on a crop, after the client's retries.
        """
        examples = []
        for _ in range(batch_size):
            example = self._examples.get()
            if isinstance(example, Exception):
                raise example
            examples.append(example)
        pixels_B3SS = torch.stack([example.pixels_3SS for example in examples])
        return pixels_B3SS, torch.stack([example.features_NC for example in examples])

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _fill(self) -> None:
        size = (self._view, self._view)
        try:
            for index, found in self._client.stream(self._views(), size=size, layout="tokens"):
                if isinstance(found, FeatureError):
                    raise found
                crop = self._crops.pop(index).resize((self._side, self._side), Image.Resampling.BOX)
                pixels_3SS = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1
                # The features are a view of a whole answer, which need not live as long.
                self._put(Example(pixels_3SS, found.features.float()))
        except Exception as error:  # noqa: BLE001 - whoever takes the next example hears of it
            self._put(error)

    def _put(self, item: Example | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._examples.put(item, timeout=0.1)
                return

    def _views(self) -> Iterator[Image.Image]:
        """Square crops at the size that the service sees, mirrored half of the time, for ever."""
        draw = random.Random(0)
        for index in itertools.count():
            if self._stop.is_set():
                return
            with Image.open(draw.choice(self._photographs)) as opened:
                photograph = opened.convert("RGB")
            side = round(min(photograph.size) * draw.uniform(0.7, 1.0))
            left = draw.randint(0, photograph.width - side)
            top = draw.randint(0, photograph.height - side)
            crop = photograph.resize(
                (self._view, self._view), box=(left, top, left + side, top + side)
            )
            if draw.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            self._crops[index] = crop
            yield crop
