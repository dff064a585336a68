"""One batch through the model: up to the device, encoded, its boxes cut out, and back.

Dimension key: B = images of a batch, h, w = image in pixels, N = patch tokens, R = register
tokens, C = channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backbone import DenseFeatures
from backbone.errors import ImageError
from backbone.preprocess import can_resize_on_cuda, decode_jpegs_on_device, resize_image
from kernels import max_similarity
from service.batcher import EncodedLayer, QueuedImage
from service.boxes import align
from service.metrics import Metrics
from service.models import ServedModel


class BatchOutput(NamedTuple):
    """Features of a batch on their way to the CPU."""

    layers: list[list[EncodedLayer]]  # by layer, by image
    grid: tuple[int, int]
    copied: torch.cuda.Event | None  # None: they are there already

    def wait(self) -> None:
        """Return when they are there.

        Raises:
            RuntimeError: CUDA tells of most failures of the forward only now.
        """
        if self.copied is not None:
            self.copied.synchronize()


class BatchEncoder:
    """Encodes batches on one device, in the thread that calls it."""

    def __init__(self, index: int, device: torch.device, metrics: Metrics) -> None:
        """
        Args:
            index: Of the device among those of a `ServedModel`.
        """
        self._index = index
        self._device = device
        self._metrics = metrics
        self._copies = _stream(device) if device.type == "cuda" else None

    def warm_up(self, models: Sequence[ServedModel]) -> None:
        """Encode one image with each model, in the ways that requests can ask for.

        A thread's first forward pays for its helpers, and a kernel's first launch for compiling it.
        """
        for model in models:
            encoder = model.encoders[self._index]
            image_13hw = torch.zeros(1, 3, *encoder.native_size, dtype=torch.uint8)
            encoder.encode(image_13hw)[0].tokens.cpu()
            if self._device.type == "cuda":
                layers = sorted({0, encoder.backbone.depth - 1})
                for features in encoder.encode(image_13hw, layers=layers, registers=True):
                    if features.registers is not None:
                        spurious_scores(features).cpu()

    @torch.inference_mode()
    def encode(self, batch: Sequence[QueuedImage]) -> BatchOutput:
        """Begin to encode images of one group; on a CPU it is done on return."""
        plan = batch[0].plan
        images_B3hw = torch.stack(self._images(batch))
        features = self._features(images_B3hw, batch)
        regions = [image.regions for image in batch if image.regions is not None]
        wants_tokens = any(image.wants_tokens for image in batch)
        layers: list[tuple[Tensor | None, ...]] = []
        boxes: list[list[Tensor | None]] = []
        for layer in features:
            has_registers = layer.registers is not None
            layers.append(
                (
                    layer.tokens if wants_tokens else None,
                    layer.prefix,
                    layer.registers if plan.registers and has_registers else None,
                    spurious_scores(layer) if plan.spurious and has_registers else None,
                )
            )
            boxes.append([*align(layer, regions)] if regions else [None] * len(batch))
        copied = [[self._copy_back(part) for part in parts] for parts in layers]
        copied_boxes = [[self._copy_back(part) for part in parts] for parts in boxes]
        event = None
        if self._copies is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._copies)
        split = [
            [_layer_of(parts, of_boxes, index) for index in range(len(batch))]
            for parts, of_boxes in zip(copied, copied_boxes, strict=True)
        ]
        return BatchOutput(split, features[0].grid, event)

    def _features(
        self, images_B3hw: Tensor, batch: Sequence[QueuedImage]
    ) -> Sequence[DenseFeatures]:
        plan = batch[0].plan
        encoder = plan.model.encoders[self._index]
        graphs = plan.model.graphs[self._index]
        wants_registers = plan.registers or plan.spurious
        if (
            graphs is not None
            and plan.layers == (encoder.backbone.depth - 1,)
            and plan.register_width == encoder.register_width(*plan.size)
            and not wants_registers
        ):
            replayed = graphs.run(images_B3hw)
            if replayed is not None:
                features, num_padding = replayed
                self._metrics.padding_tokens.inc(num_padding * batch[0].num_tokens)
                return [features]
        return encoder.encode(
            images_B3hw,
            layers=plan.layers,
            register_width=plan.register_width,
            registers=wants_registers,
        )

    def _images(self, batch: Sequence[QueuedImage]) -> list[Tensor]:
        """uint8 [3, h, w] of each image on the device, of the size that it is encoded at.

        Raises:
            ImageError: a JPEG that was left to the device is damaged.
        """
        files = [image.pixels_3HW for image in batch if isinstance(image.pixels_3HW, bytes)]
        decoded = iter(decode_jpegs_on_device(files, self._device) if files else ())
        images = []
        for image in batch:
            pixels = image.pixels_3HW
            uploaded = next(decoded) if isinstance(pixels, bytes) else self._uploaded(pixels)
            if isinstance(uploaded, ImageError):
                raise uploaded
            images.append(self._resized(uploaded, image.plan.size))
        return images

    def _uploaded(self, pixels_3HW: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return pixels_3HW
        return pixels_3HW.pin_memory().to(self._device, non_blocking=True)

    def _resized(self, pixels_3HW: Tensor, size: tuple[int, int]) -> Tensor:
        original = (pixels_3HW.shape[1], pixels_3HW.shape[2])
        if self._device.type == "cuda" and not can_resize_on_cuda(original, size):
            return resize_image(pixels_3HW.cpu(), size).to(self._device)
        return resize_image(pixels_3HW, size)

    def _copy_back(self, part: Tensor | None) -> Tensor | None:
        if part is None or self._copies is None:
            return part
        on_host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            on_host.copy_(part, non_blocking=True)
        part.record_stream(self._copies)
        return on_host


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def spurious_scores(features: DenseFeatures) -> Tensor:
    """How little each patch token has to do with its place: float32 [B, N, 2].

    The highest cosine to any register token, in [-1, 1]; and by how many standard deviations of
    the image's tokens its length exceeds their mean.

    Source: the register tokens gather what is spurious, UniRefiner, arXiv:2605.19622; outliers by
    norm, "Vision Transformers Need Registers", arXiv:2309.16588.
    """
    assert features.registers is not None
    cosine_BN = max_similarity(features.tokens, features.registers, normalize=True).values
    norm_BN = features.tokens.float().norm(dim=-1)
    deviation_BN = norm_BN - norm_BN.mean(dim=-1, keepdim=True)
    # Of a single token, or of equal ones, the deviation is 0 and so is the score.
    spread_B1 = norm_BN.std(dim=-1, keepdim=True, correction=0).clamp_min(1e-12)
    return torch.stack([cosine_BN.float(), deviation_BN / spread_B1], dim=-1)


def _layer_of(
    parts: Sequence[Tensor | None], boxes: Sequence[Tensor | None], index: int
) -> EncodedLayer:
    tokens_NC, prefix_PC, registers_RC, spurious_N2 = (_at(part, index) for part in parts)
    assert prefix_PC is not None
    return EncodedLayer(tokens_NC, prefix_PC, registers_RC, spurious_N2, boxes[index])


def _at(part_B: Tensor | None, index: int) -> Tensor | None:
    return None if part_B is None else part_B[index]


def own(layer: EncodedLayer) -> EncodedLayer:
    """The same in memory of its own: kept in a cache, a view would keep its whole batch, and on
    a CUDA device that in pinned memory."""
    return EncodedLayer(
        tokens_NC=_copied(layer.tokens_NC),
        prefix_PC=layer.prefix_PC.clone(),
        registers_RC=_copied(layer.registers_RC),
        spurious_N2=_copied(layer.spurious_N2),
        boxes_VC=_copied(layer.boxes_VC),
    )


def _copied(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()
