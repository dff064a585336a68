"""The images of a request: examined, looked up, admitted, decoded, encoded.

An image is told by the hash of its bytes, so that it is neither decoded nor encoded when its map
is in the cache, or just being computed for somebody else. What is left is admitted together,
before anything is decoded.

Dimension key: H, W = an image as sent, in pixels, h, w = the size that it is encoded at.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from backbone.errors import ImageError
from backbone.preprocess import read_image_header, resize_image, resolve_size, suits_nvjpeg
from service import errors
from service.admission import Admission
from service.batcher import Batcher, BatcherClosedError, EncodingPlan, QueuedImage
from service.boxes import Regions
from service.cache import Entry, FeatureCache
from service.decoding import DecodedImage, WorkerPool, decode_resized
from service.flights import Flight, Flights
from service.maps import FeatureMap, cached_map, map_key, map_of
from service.metrics import Metrics, Stage
from service.models import ServedModel
from service.options import CacheUse, FeatureOptions
from service.pixels import Pixels
from service.room import ByteRoom
from service.settings import Settings

ItemError = ImageError | errors.ServiceError

# Pixels that wait for an engine. Where the device resizes, an image of few tokens may be 120 MB;
# its file, which waits instead, is a small part of that.
_MAX_DECODED_BYTES = 2 * 1024**3


class Examined(NamedTuple):
    """What can be told about an image without decoding it."""

    digest: str  # SHA-256, of the file or of raw pixels
    original: tuple[int, int]  # (H, W) px, upright


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a request, and what is wanted of it."""

    index: int
    source: bytes | Pixels
    original: tuple[int, int]
    asked_size: int | tuple[int, int]
    plan: EncodingPlan
    num_tokens: int
    key: str
    regions: Regions | None

    def size_of(self, original: tuple[int, int]) -> tuple[int, int]:
        """The size to encode at, of what was decoded: a header may have told otherwise."""
        if original == self.original:
            return self.plan.size
        return resolve_size(*original, self.asked_size, self.plan.model.encoder.patch_size)


@dataclass(slots=True)
class Outcome:
    """Where an image's map comes from: the cache, or a flight that this request has joined."""

    item: Item
    found: FeatureMap | None
    flight: "Flight[Computed] | None"


@dataclass(slots=True)
class Computed:
    """A map that was not in the cache, and the seconds it took."""

    features: FeatureMap
    seconds: dict[Stage, float] = field(default_factory=dict)


def examine(source: bytes | Pixels, max_pixels: int) -> Examined:
    """Hash an image and read its size; call it off the event loop.

    Raises:
        ImageError: the header is damaged, too large, or of no supported format.
    """
    if isinstance(source, Pixels):
        height, width, _ = source.rgb_HW3.shape
        if height * width > max_pixels:
            raise errors.ImageTooLargeError(
                f"the image has {height}x{width} pixels, {max_pixels} are allowed; send a smaller "
                "one"
            )
        return Examined(source.digest.hex(), (height, width))
    header = read_image_header(source, max_pixels=max_pixels)
    return Examined(hashlib.sha256(source).hexdigest(), header.upright_size)


def choose_size(
    original: tuple[int, int], options: FeatureOptions, model: ServedModel, settings: Settings
) -> tuple[int, int]:
    """The size in pixels that an image is encoded at.

    Raises:
        ImageSizeError: it is not whole patches.
        InvalidOptionError: it is beyond the declared bounds.
    """
    encoder = model.encoder
    size = options.size or encoder.native_size
    longest = size if isinstance(size, int) else max(size)
    if longest > settings.max_size:
        raise errors.InvalidOptionError(
            f"option 'size' is {longest} px long, {settings.max_size} are allowed; ask for less"
        )
    resized = resolve_size(*original, size, encoder.patch_size)
    if settings.only_buckets and resized not in model.buckets:
        known = ", ".join(f"{height}x{width}" for height, width in model.buckets)
        raise errors.InvalidOptionError(
            f"{resized[0]}x{resized[1]} px is no bucket of this service; ask for a size of {known}"
        )
    tokens = encoder.num_tokens(*resized, options.register_width)
    if tokens > settings.max_image_tokens:
        raise errors.InvalidOptionError(
            f"an image of {resized[0]}x{resized[1]} px costs {tokens} tokens, "
            f"{settings.max_image_tokens} are allowed; ask for a smaller size or register_width"
        )
    return resized


def plan_item(
    index: int,
    source: bytes | Pixels,
    examined: Examined,
    options: FeatureOptions,
    model: ServedModel,
    layers: tuple[int, ...],
    regions: Regions | None,
    settings: Settings,
) -> Item:
    """What an examined image will cost and be called.

    Raises:
        ImageError, InvalidOptionError: it cannot be had at the size or width asked for.
    """
    encoder = model.encoder
    size = choose_size(examined.original, options, model, settings)
    width = encoder.register_width(*size, options.register_width)
    needs_border = {"registers", "spurious"} & set(options.include)
    if needs_border and width == 0:
        raise errors.InvalidOptionError(
            f"option 'include' asks for {sorted(needs_border)[0]!r}, and {model.name!r} is encoded "
            "without register border here; ask a refined model, with a register_width above 0"
        )
    plan = EncodingPlan(
        model=model,
        size=size,
        layers=layers,
        register_width=width,
        registers="registers" in options.include,
        spurious="spurious" in options.include,
    )
    return Item(
        index=index,
        source=source,
        original=examined.original,
        asked_size=options.size or encoder.native_size,
        plan=plan,
        num_tokens=encoder.num_tokens(*size, width),
        key=map_key(examined.digest, plan),
        regions=regions,
    )


class Workshop:
    """Turns the items of requests into feature maps; for the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        batcher: Batcher,
        admission: Admission,
        cache: FeatureCache,
        decoders: WorkerPool,
        metrics: Metrics,
        resizes_on_device: bool,
    ) -> None:
        self._settings = settings
        self._batcher = batcher
        self._admission = admission
        self._cache = cache
        self._decoders = decoders
        self._metrics = metrics
        self._resizes_on_device = resizes_on_device
        self._flights: Flights[Computed] = Flights()
        self._room = ByteRoom(_MAX_DECODED_BYTES)

    async def begin(
        self, items: Sequence[Item], use: CacheUse, *, deadline: float | None = None
    ) -> list[Outcome]:
        """Look items up and begin on those that are not there; all are admitted, or none.

        Args:
            items: Of one request.
            use: What it says about the cache.
            deadline: Of the request, in the event loop's time.

        Raises:
            OverloadedError: too much is waiting already.
        """
        found: Sequence[FeatureMap | None] = [None] * len(items)
        if use == "default" and self._cache.is_enabled:
            entries = await self._cache.get_many([item.key for item in items])
            found = [self._known(item, entry) for item, entry in zip(items, entries, strict=True)]
        # From here to the end nothing is awaited: what is not in flight now is begun here.
        shares = use == "default"
        new_keys: set[str] = set()
        tokens = 0
        for item, features in zip(items, found, strict=True):
            if features is not None:
                continue
            if not shares or (item.key not in self._flights and item.key not in new_keys):
                new_keys.add(item.key)
                tokens += item.num_tokens
        if tokens:
            now = asyncio.get_running_loop().time()
            left = None if deadline is None else max(0.0, deadline - now)
            self._admission.admit(tokens, seconds_left=left)
        # Few bytes can take seconds to decode: the pool is shared with images that came later, so
        # a request has only as many in it as keep all threads busy.
        turns = asyncio.Semaphore(self._settings.num_decode_threads + 1)
        return [
            Outcome(item, features, None if features else self._flight(item, use, shares, turns))
            for item, features in zip(items, found, strict=True)
        ]

    def _known(self, item: Item, entry: Entry | None) -> FeatureMap | None:
        if entry is None:
            return None
        features = cached_map(entry, item.plan)
        if features is None:
            self._cache.note_foreign(item.key)  # it is computed, and written over
        return features

    def _flight(
        self, item: Item, use: CacheUse, shares: bool, turns: asyncio.Semaphore
    ) -> Flight[Computed]:
        flight = self._flights.join(item.key) if shares else None
        if flight is not None:
            self._metrics.coalesced_images.inc()
            return flight

        def release() -> None:
            self._admission.release(item.num_tokens)

        if shares:
            return self._flights.begin(item.key, self._compute(item, use, turns), release)
        return Flight(self._compute(item, use, turns), release)

    async def _compute(self, item: Item, use: CacheUse, turns: asyncio.Semaphore) -> Computed:
        async with self._room.hold(self._decoded_bytes(item)):
            return await self._compute_decoded(item, use, turns)

    def _decoded_bytes(self, item: Item) -> int:
        """What its pixels take up until they are encoded."""
        if self._is_for_device(item.source):
            return 0
        height, width = item.original if self._resizes_on_device else item.plan.size
        return 3 * height * width

    async def _compute_decoded(
        self, item: Item, use: CacheUse, turns: asyncio.Semaphore
    ) -> Computed:
        started = time.perf_counter()
        pixels: torch.Tensor | bytes
        if self._is_for_device(item.source):
            assert isinstance(item.source, bytes)
            pixels, original = item.source, item.original
        else:
            async with turns:
                decoded = await self._decode(item)
            pixels, original = decoded.pixels_3hw, decoded.original
        ended = time.perf_counter()
        # A map of another size than the header promised would lie under a wrong name.
        fills = use != "bypass" and self._cache.is_enabled and original == item.original
        queued = QueuedImage(
            pixels,
            replace(item.plan, size=item.size_of(original)),
            item.num_tokens,
            item.regions,
            # Others may join, with boxes of their own or none.
            wants_tokens=use != "bypass" or item.regions is None,
        )
        try:
            encoded = await asyncio.wrap_future(self._batcher.submit(queued))
        except BatcherClosedError:
            raise errors.NotReadyError("the engine has stopped; retry in a moment") from None
        features = map_of(encoded, original, item.regions)
        if fills:
            self._cache.put(item.key, features.to_entry())
        seconds: dict[Stage, float] = {
            "decode": ended - started,
            "queue": encoded.queue_seconds,
            "forward": encoded.forward_seconds,
        }
        return Computed(features, seconds)

    def _is_for_device(self, source: bytes | Pixels) -> bool:
        nvjpeg = self._settings.jpeg_decoder == "nvjpeg"
        return nvjpeg and isinstance(source, bytes) and suits_nvjpeg(source)

    async def _decode(self, item: Item) -> DecodedImage:
        if isinstance(item.source, Pixels):
            return await self._decoders.run(
                _resize_pixels, item.source, item.plan.size, self._resizes_on_device
            )
        decode = decode_resized
        if self._resizes_on_device:
            decode = partial(decode_resized, resize_on_device=True)
        return await self._decoders.run(
            decode,
            item.source,
            lambda height, width: item.size_of((height, width)),
            self._settings.max_image_pixels,
        )


def _resize_pixels(pixels: Pixels, size: tuple[int, int], keeps_size: bool) -> DecodedImage:
    # A copy, because torch wants memory that may be written.
    rgb_HW3 = np.array(pixels.rgb_HW3)
    pixels_3HW = torch.from_numpy(rgb_HW3).permute(2, 0, 1)
    original = (rgb_HW3.shape[0], rgb_HW3.shape[1])
    if keeps_size:
        return DecodedImage(pixels_3HW, original, original)
    return DecodedImage(resize_image(pixels_3HW, size), original, size)
