"""What is served: a backbone, its register border, a device and a precision.

encoder = open_model("models/demo")
features, = encoder.encode(images)       # uint8 [B, 3, h, w] -> clean tokens, border stripped
"""

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from backbone.artifact import Manifest, RegisterBorder, is_artifact, load_artifact
from backbone.digest import weights_digest
from backbone.errors import ImageSizeError
from backbone.preprocess import Normalization
from backbone.registers import LearnableBorder, canvas_size, strip, surround
from backbone.served import obstacle, served_layers
from backbone.vit import Backbone, DenseFeatures
from kernels import TokenWindow, sdpa_in_order

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16"]
_MAX_CACHED_BORDERS = 32


class DenseEncoder:
    """Images in, dense features out; deterministic for a given batch, device and build.

    Attributes:
        backbone: The backbone, in evaluation mode on `device`.
        manifest: The artifact's manifest; None for a backbone that was not refined.
        border: Its register border; None for a backbone that was not refined.
        digest: SHA-256 of the weights as stored.
        precision: `fp32` or `bf16`.
        native_size: (h, w) in pixels, the default size of images.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        digest: str,
        manifest: Manifest | None = None,
        learned_border: LearnableBorder | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "auto",
    ) -> None:
        self.device = torch.device(device)
        self.precision = choose_precision(precision, self.device)
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.backbone = backbone.to(self.device, self.dtype).eval().requires_grad_(False)
        self.digest = digest
        self.manifest = manifest
        self.border: RegisterBorder | None = manifest.border if manifest else None
        self._learned_border = learned_border
        self._borders: OrderedDict[tuple[tuple[int, int], int], Tensor] = OrderedDict()
        # Made once: to copy them to a CUDA device for every batch would wait for the batch before.
        self._normalization = Normalization.of(backbone.mean, backbone.std, self.device)
        self._borders_lock = threading.Lock()
        reason = obstacle(backbone.vit)
        self._is_served = reason is None
        if reason is not None:
            logger.warning(
                "%s has %s: it is encoded by timm's own forward, without the project's attention",
                backbone.name,
                reason,
            )

    @property
    def native_size(self) -> tuple[int, int]:
        return self.backbone.native_size

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the features of given pixels, versions of libraries apart."""
        border = self._learned_border.state_dict() if self._learned_border else {}
        parts = {
            "backbone": self.backbone.name,
            "digest": self.digest,
            "border": self.border.model_dump() if self.border else None,
            "learned_border": weights_digest(border),
            "mean": self.backbone.mean,
            "std": self.backbone.std,
            "dense_norm": self.backbone.dense_norm,
            "precision": self.precision,
            "device": self.device.type,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def register_width(self, height: int, width: int, asked: int | None = None) -> int:
        """Border width in patches of an image of `height` x `width` pixels; 0 without a border.

        Raises:
            ImageSizeError: the image is not whole patches, or a width was asked for that is
                negative or that a backbone without register border cannot have.
        """
        grid = self.backbone.grid(height, width)
        if asked is None:
            return self.border.width(grid) if self.border else 0
        if asked < 0 or (asked > 0 and self.border is None):
            raise ImageSizeError(
                f"register width {asked} is not possible: "
                + ("it is negative" if asked < 0 else "this backbone was not refined")
            )
        return asked

    def num_tokens(self, height: int, width: int, register_width: int | None = None) -> int:
        """Tokens that one image costs the backbone: canvas and prefix tokens."""
        extra = 2 * self.register_width(height, width, register_width)
        rows, columns = self.backbone.grid(height, width)
        return (rows + extra) * (columns + extra) + self.backbone.num_prefix_tokens

    @torch.inference_mode()
    def encode(
        self,
        images_B3hw: Tensor,
        *,
        layers: Sequence[int] = (-1,),
        register_width: int | None = None,
        registers: bool = False,
    ) -> list[DenseFeatures]:
        """Dense features of uint8 images.

        Args:
            images_B3hw: uint8, sides whole patches.
            layers: Block numbers; negative ones count from the end.
            register_width: Border width in patches; default the artifact's rule. A wider border
                than in training usually gives cleaner maps; 0 encodes without one.
            registers: Also return the border's tokens. It costs what is saved otherwise: in the
                last block that is needed, nothing is computed for tokens that are not returned.

        Returns:
            One `DenseFeatures` per layer with the border stripped: tokens of the image alone.
            `registers` has the border's, or None if they were not asked for or there is no
            border. In the encoder's precision.

        Raises:
            ImageSizeError: sizes that the patch grid or the border cannot have.
            ValueError: a layer that the backbone does not have.
        """
        height, image_width = images_B3hw.shape[-2:]
        width = self.register_width(height, image_width, register_width)
        canvas_B3HW = self.canvas(images_B3hw, width)
        return self.encode_canvas(canvas_B3HW, width, layers=layers, registers=registers)

    def canvas(self, images_B3hw: Tensor, width: int) -> Tensor:
        """Normalised pixels of uint8 images with a border of `width` patches around each."""
        pixels = self._normalization(images_B3hw.to(self.device), self.dtype)
        if not width:
            return pixels
        height, image_width = images_B3hw.shape[-2:]
        border = self._border((height, image_width), width)
        return surround(pixels, border, width=width, patch_size=self.patch_size)

    @torch.inference_mode()
    def encode_canvas(
        self,
        canvas_B3HW: Tensor,
        width: int,
        *,
        layers: Sequence[int] = (-1,),
        registers: bool = False,
    ) -> list[DenseFeatures]:
        """The part of `encode` after `canvas`: kernels only, so that CUDA graphs can hold it."""
        rows, columns = self.backbone.grid(*canvas_B3HW.shape[-2:])
        grid = (rows - 2 * width, columns - 2 * width)
        if self._is_served:
            encoded = self._served_layers(canvas_B3HW, layers, border=0 if registers else width)
        else:
            encoded = self.backbone.encode_layers(canvas_B3HW, layers)
        return [_stripped(features, grid, width, registers=registers) for features in encoded]

    def _served_layers(
        self, canvas_B3HW: Tensor, layers: Sequence[int], *, border: int
    ) -> list[DenseFeatures]:
        """As `Backbone.encode_layers`, without the outermost `border` tokens of the canvas."""
        num_prefix, num_border = self.backbone.num_prefix_tokens, 2 * border
        canvas_h, canvas_w = self.backbone.grid(*canvas_B3HW.shape[-2:])
        grid = (canvas_h - num_border, canvas_w - num_border)
        wanted = [self.backbone.layer_number(layer) for layer in layers]
        ascending = sorted(set(wanted))
        with sdpa_in_order(canvas_B3HW.device):
            outputs = served_layers(
                self.backbone.vit,
                canvas_B3HW,
                layers=ascending,
                window=TokenWindow(grid, border, num_prefix),
                norm=self.backbone.dense_norm,
            )
        features = {
            layer: DenseFeatures(
                output[:, num_prefix:], grid, self.patch_size, output[:, :num_prefix]
            )
            for layer, output in zip(ascending, outputs, strict=True)
        }
        return [features[layer] for layer in wanted]

    def _border(self, image: tuple[int, int], width: int) -> Tensor:
        canvas = canvas_size(image, width, self.patch_size)
        key = (canvas, width)
        with self._borders_lock:  # several threads may encode at a time
            if key not in self._borders:
                assert self.border is not None  # register_width is 0 without a border
                pixels = self.border.pixels(canvas, width, self._learned_border)
                self._borders[key] = pixels.to(self.device, self.dtype)
                if len(self._borders) > _MAX_CACHED_BORDERS:
                    self._borders.popitem(last=False)
            self._borders.move_to_end(key)
            return self._borders[key]


def _stripped(
    features: DenseFeatures, grid: tuple[int, int], width: int, *, registers: bool
) -> DenseFeatures:
    if features.grid == grid:
        return features
    image, border = strip(features.tokens, grid, width)
    return replace(features, tokens=image, grid=grid, registers=border if registers else None)


def open_model(
    spec: str | Path,
    *,
    weights: Path | None = None,
    random_weights: bool = False,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    expects_raw: bool = False,
) -> DenseEncoder:
    """Open an artifact, or any backbone that `Backbone.load` reads, for encoding.

    Args:
        spec: Artifact, or what `Backbone.load` reads.
        weights, random_weights: See `Backbone.load`; with either, an artifact is not one.
        device, precision: Of the encoder.
        expects_raw: Whoever calls knows that the backbone may be raw, so that it is no warning.

    Raises:
        ModelError: see `load_artifact` and `Backbone.load`.
    """
    started = time.monotonic()
    folder = str(spec).removeprefix("local-dir:")
    is_bf16 = choose_precision(precision, torch.device(device)) == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    if is_artifact(folder) and weights is None and not random_weights:
        artifact = load_artifact(folder, dtype=dtype)
        encoder = DenseEncoder(
            artifact.backbone,
            digest=artifact.manifest.digest,
            manifest=artifact.manifest,
            learned_border=artifact.learned_border,
            device=device,
            precision=precision,
        )
    else:
        backbone = Backbone.load(spec, weights=weights, random_weights=random_weights, dtype=dtype)
        origin = backbone.origin
        digest = origin.digest if origin else weights_digest(backbone.vit.state_dict())
        encoder = DenseEncoder(backbone, digest=digest, device=device, precision=precision)
        if not expects_raw:
            logger.warning("%s is not an artifact: features are raw, without register border", spec)
    logger.info(
        "loaded %s (%s, digest %s) on %s in %s, %.1f s",
        spec,
        encoder.backbone.name,
        encoder.digest[:12],
        encoder.device,
        encoder.precision,
        time.monotonic() - started,
    )
    return encoder


def choose_precision(asked: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """`auto` is bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a forward is faster in bf16: with matrix units, or AVX-512's bf16 products."""
    if has_bf16_matrix_units(device):
        return True
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def has_bf16_matrix_units(device: torch.device) -> bool:
    """Tensor cores of CUDA compute capability 8.0 and later, or AMX on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
