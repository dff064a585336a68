"""The models that are served: each loaded on every device, found by name, swapped as a whole.

A request holds on to the model that it began with, so one that is dropped or replaced meanwhile
still answers it, and its memory is free when the last such request is done.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

import torch

from backbone import DenseEncoder, open_model
from backbone.preprocess import DECODER_VERSION
from service.errors import ConflictError, UnknownModelError
from service.graphs import GraphPool, capture_buckets
from service.hints import nearest
from service.settings import Settings, SettingsError
from service.warmup import WarmUp, warm_up

logger = logging.getLogger(__name__)

OpenEncoder = Callable[[str, Settings, str], DenseEncoder]

# Other versions of these may add up in another order, so their features are not the same bytes.
_LIBRARIES = ("torch", "torchvision", "timm", "triton")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that is loaded and warmed up."""

    name: str
    spec: str
    encoders: tuple[DenseEncoder, ...]  # one per device
    graphs: tuple[GraphPool | None, ...]  # likewise; None without CUDA graphs
    warm_up: WarmUp
    buckets: tuple[tuple[int, int], ...]  # (h, w) px, made ready
    fingerprint: str  # of all that decides the features of an image file, but the request

    @property
    def encoder(self) -> DenseEncoder:
        """On the first device: for what is the same on all."""
        return self.encoders[0]


class ModelRegistry:
    """Models by name; reading is lock-free, changes are one at a time."""

    def __init__(
        self, settings: Settings, devices: Sequence[str], open_encoder: OpenEncoder | None = None
    ) -> None:
        self._settings = settings
        self._devices = tuple(devices)
        self._open_encoder = open_encoder or load_encoder
        self._models: MappingProxyType[str, ServedModel] = MappingProxyType({})
        self._changing = threading.Lock()

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """All of them; the first is the default."""
        return tuple(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, or the default one.

        Raises:
            UnknownModelError: there is none.
        """
        models = self._models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise UnknownModelError(f"no model {name[:80]!r} is served; {nearest(name, models)}")
        return models[name]

    def load(self, name: str, spec: str) -> ServedModel:
        """Load and warm up a model, then serve it. Takes as long as the weights are large.

        Raises:
            ConflictError: another one has the name, or is being loaded.
            RefineryError, SettingsError, RuntimeError: it cannot be loaded, or does not fit.
        """
        if not self._changing.acquire(blocking=False):
            raise ConflictError("another model is being loaded; retry when it is done")
        try:
            if name in self._models:
                raise ConflictError(f"a model {name!r} is served already; drop it first")
            model = self._load(name, spec)
            self._models = MappingProxyType({**self._models, name: model})
        finally:
            self._changing.release()
        return model

    def drop(self, name: str) -> None:
        """Serve a model no more.

        Raises:
            UnknownModelError: there is none of that name.
            ConflictError: it is the only one, or another one is being loaded.
        """
        # Not waited for: that would hold up the event loop until the other model is loaded.
        if not self._changing.acquire(blocking=False):
            raise ConflictError("a model is being loaded; retry when it is done")
        try:
            self.find(name)
            if len(self._models) == 1:
                raise ConflictError(f"{name!r} is the only model; load another one first")
            kept = {key: model for key, model in self._models.items() if key != name}
            self._models = MappingProxyType(kept)
        finally:
            self._changing.release()
        logger.info("dropped model %s", name)

    def _load(self, name: str, spec: str) -> ServedModel:
        with ThreadPoolExecutor(len(self._devices), "load") as threads:
            parts = list(threads.map(lambda device: self._load_on(spec, device), self._devices))
        encoders = tuple(part[0] for part in parts)
        versions = [f"{library} {_version(library)}" for library in _LIBRARIES]
        decoder = f"{DECODER_VERSION} {self._settings.jpeg_decoder}"
        decides = (encoders[0].fingerprint, decoder, *versions)
        return ServedModel(
            name=name,
            spec=spec,
            encoders=encoders,
            graphs=tuple(part[1] for part in parts),
            warm_up=parts[0][2],
            buckets=self._buckets(encoders[0]),
            fingerprint=hashlib.sha256("\n".join(decides).encode()).hexdigest(),
        )

    def _load_on(self, spec: str, device: str) -> tuple[DenseEncoder, GraphPool | None, WarmUp]:
        if self._settings.jpeg_decoder == "nvjpeg" and torch.device(device).type != "cuda":
            raise SettingsError(f"--jpeg-decoder nvjpeg needs a CUDA device, and this is {device}")
        torch.set_num_threads(self._settings.num_torch_threads)
        encoder = self._open_encoder(spec, self._settings, device)
        buckets = self._buckets(encoder)
        self._check_sizes(encoder, buckets)
        budget = self._settings.batch_tokens
        measured = warm_up(encoder, buckets, max_tokens=budget)
        graphs = capture_buckets(
            encoder,
            buckets,
            max_tokens=budget,
            mode=self._settings.cuda_graphs,
            tolerance=measured.max_relative_error,
        )
        return encoder, graphs, measured

    def _buckets(self, encoder: DenseEncoder) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys((encoder.native_size, *self._settings.bucket_sizes)))

    def _check_sizes(self, encoder: DenseEncoder, buckets: Sequence[tuple[int, int]]) -> None:
        limit, longest = self._settings.max_image_tokens, self._settings.max_size
        for height, width in buckets:
            if max(height, width) > longest:
                raise SettingsError(
                    f"a bucket of {height}x{width} px is longer than --max-size {longest}: raise it"
                )
            tokens = encoder.num_tokens(height, width)
            if tokens > limit:
                raise SettingsError(
                    f"an image of {height}x{width} px costs {tokens} tokens and "
                    f"--max-image-tokens is {limit}: set it, and --batch-tokens, to {tokens} or "
                    "more"
                )


def load_encoder(spec: str, settings: Settings, device: str) -> DenseEncoder:
    """The model that `spec` names, on `device`."""
    # What goes with the model of the command line is not meant for those loaded later.
    is_first = spec in settings.models.values()
    return open_model(
        spec,
        weights=settings.weights if is_first else None,
        random_weights=settings.random_weights and is_first,
        device=device,
        precision=settings.precision,
    )


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"
