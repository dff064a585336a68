"""What a model says about one image, as it is computed once and cached, whatever is made of it.

Dimension key: H, W = an image as sent, in pixels, h, w = patch grid, N = h * w patch tokens.
"""

import hashlib
import json
from dataclasses import dataclass

from torch import Tensor

from service.batcher import EncodedImage, EncodedLayer, EncodingPlan
from service.boxes import Regions
from service.cache import Entry

_PARTS = ("tokens", "prefix", "registers", "spurious")


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """Tokens of one image in the model's precision, per layer."""

    layers: tuple[EncodedLayer, ...]
    grid: tuple[int, int]
    original: tuple[int, int]  # (H, W) px, upright
    regions: Regions | None = None  # whose boxes `layers` hold, cut out on the device

    def to_entry(self) -> Entry:
        """For the cache: everything but the boxes."""
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            for name in _PARTS:
                part = getattr(layer, f"{name}_{_SHAPES[name]}")
                if part is not None:
                    tensors[f"{number}.{name}"] = part
        return Entry(
            tensors,
            {
                "grid": json.dumps(self.grid),
                "original": json.dumps(self.original),
                "layers": str(len(self.layers)),
            },
        )

    @classmethod
    def from_entry(cls, entry: Entry) -> "FeatureMap":
        """What `to_entry` wrote."""
        tensors = entry.tensors
        layers = tuple(
            EncodedLayer(
                tokens_NC=tensors[f"{number}.tokens"],
                prefix_PC=tensors[f"{number}.prefix"],
                registers_RC=tensors.get(f"{number}.registers"),
                spurious_N2=tensors.get(f"{number}.spurious"),
                boxes_VC=None,
            )
            for number in range(int(entry.metadata["layers"]))
        )
        return cls(layers, _pair(entry, "grid"), _pair(entry, "original"))


_SHAPES = {"tokens": "NC", "prefix": "PC", "registers": "RC", "spurious": "N2"}


def map_of(encoded: EncodedImage, original: tuple[int, int], regions: Regions | None) -> FeatureMap:
    """The map of an image that an engine has encoded."""
    return FeatureMap(encoded.layers, encoded.grid, original, regions)


def cached_map(entry: Entry, plan: EncodingPlan) -> FeatureMap | None:
    """The map of a cached entry; None when it is none of `plan`, as another program may write.

    A checksum is no signature, and what is wrong under a name would stay wrong.
    """
    try:
        features = FeatureMap.from_entry(entry)
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return None
    return features if _suits(features, plan) else None


def _suits(features: FeatureMap, plan: EncodingPlan) -> bool:
    patch_size = plan.model.encoder.patch_size
    h, w = plan.size[0] // patch_size, plan.size[1] // patch_size
    if features.grid != (h, w) or min(features.original) < 1:
        return False
    if len(features.layers) != len(plan.layers):
        return False
    return all(_layer_suits(layer, h * w, plan) for layer in features.layers)


def _layer_suits(layer: EncodedLayer, num_tokens: int, plan: EncodingPlan) -> bool:
    tokens_NC, prefix_PC = layer.tokens_NC, layer.prefix_PC
    registers_RC, spurious_N2 = layer.registers_RC, layer.spurious_N2
    if tokens_NC is None or tokens_NC.ndim != 2 or tokens_NC.shape[0] != num_tokens:
        return False
    if (registers_RC is not None, spurious_N2 is not None) != (plan.registers, plan.spurious):
        return False
    if spurious_N2 is not None and spurious_N2.shape != (num_tokens, 2):
        return False
    channels = tokens_NC.shape[1]
    rows = [prefix_PC] if registers_RC is None else [prefix_PC, registers_RC]
    return all(part.ndim == 2 and part.shape[1] == channels for part in rows)


def map_key(image_digest: str, plan: EncodingPlan) -> str:
    """The name of a map: two requests share it exactly when their maps are equal.

    Args:
        image_digest: SHA-256 of the file's bytes, or of raw pixels and their shape.
        plan: What the model is asked for.
    """
    parts = (
        "map 1",
        image_digest,
        plan.model.fingerprint,
        f"{plan.size[0]}x{plan.size[1]}",
        ",".join(map(str, plan.layers)),
        str(plan.register_width),
        f"registers={plan.registers} spurious={plan.spurious}",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pair(entry: Entry, name: str) -> tuple[int, int]:
    first, second = json.loads(entry.metadata[name])
    return int(first), int(second)
