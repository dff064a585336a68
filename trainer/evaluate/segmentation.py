"""Semantic segmentation by a linear probe, on a folder of images and label maps.

DATA/classes.json                 {"0": "Sky", "1": "Building", ...}
DATA/{train,val}/images/NAME.jpg  photographs
DATA/{train,val}/labels/NAME.png  one class number per pixel, 255 = ignore
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.errors import RefineryError
from trainer.evaluate.probe import ProbeResult, ProbeSettings, linear_probe

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# Images uint8 [B, 3, H, W] to patch tokens [B, N, C], raster order.
Encode = Callable[[Tensor], Tensor]


class DatasetError(RefineryError):
    """A folder that is not a segmentation data set."""


@dataclass(frozen=True)
class Sample:
    """One image and its label map."""

    image: Path
    label: Path


@dataclass(frozen=True)
class SegmentationDataset:
    """A labelled data set on disk.

    Attributes:
        name: The folder's name.
        classes: Class names; the position is the class number.
        train: Samples to fit the probe on, sorted by name.
        val: Samples to score it on, sorted by name.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]

    @classmethod
    def open(cls, folder: Path) -> SegmentationDataset:
        """List a data set; pixels are read later.

        Raises:
            DatasetError: A part, the classes, or the label of an image is missing.
        """
        return cls(
            name=folder.resolve().name,
            classes=_read_classes(folder / "classes.json"),
            train=_list_samples(folder / "train"),
            val=_list_samples(folder / "val"),
        )


@dataclass(frozen=True)
class SegmentationResult:
    """What the probe reached, and how.

    Attributes:
        dataset: Name of the data set.
        size: (height, width) that images were resized to, in pixels.
        classes: Names, in the order of the scores' `class_iou`.
        probe: Scores, and mIoU by learning rate.
        encode_seconds: Reading and encoding all images.
        probe_seconds: Training and scoring the probe.
    """

    dataset: str
    size: tuple[int, int]
    classes: tuple[str, ...]
    probe: ProbeResult
    encode_seconds: float
    probe_seconds: float


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DatasetError(
            f'{path} is missing; it names the classes, like {{"0": "Sky", "1": "Building"}}'
        ) from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    expected = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if not expected or sorted(names, key=str) != sorted(expected):
        raise DatasetError(f'{path} must number its classes from 0 without gaps, like {{"0": ...}}')
    return tuple(str(names[number]) for number in expected)


def _list_samples(folder: Path) -> tuple[Sample, ...]:
    images = sorted(
        path for path in (folder / "images").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not images:
        raise DatasetError(f"no images in {folder / 'images'}")
    samples = [Sample(path, folder / "labels" / f"{path.stem}.png") for path in images]
    missing = [sample for sample in samples if not sample.label.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(samples)} images in {folder / 'images'} have no label; the "
            f"first missing one is {missing[0].label}"
        )
    return tuple(samples)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (height, width), without keeping its aspect; uint8 `[3, H, W]`."""
    height, width = size
    with Image.open(path) as opened:
        resized = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def read_label(path: Path) -> Tensor:
    """A label map at its own size; uint8 `[H, W]`.

    Raises:
        DatasetError: The file is not a single-channel image of class numbers.
    """
    with Image.open(path) as opened:
        if opened.mode not in ("L", "P"):
            raise DatasetError(f"{path} has mode {opened.mode}; a label map has one 8-bit channel")
        return torch.from_numpy(np.array(opened))


def _encode_all(
    samples: tuple[Sample, ...], encode: Encode, *, size: tuple[int, int], batch_size: int
) -> Iterator[Tensor]:
    """Token grids `[h, w, C]` of all samples, in float16: half the memory of float32."""
    with ThreadPoolExecutor(2) as pool:
        pixels = pool.map(lambda sample: read_image(sample.image, size), samples)
        for start in range(0, len(samples), batch_size):
            count = min(batch_size, len(samples) - start)
            tokens_BNC = encode(torch.stack([next(pixels) for _ in range(count)]))
            h, w = _token_grid(tokens_BNC.shape[1], size)
            yield from tokens_BNC.half().reshape(count, h, w, -1)


def _token_grid(num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of square patches that gives this number of tokens."""
    height, width = size
    for patch_size in range(1, min(size) + 1):
        h, w = height // patch_size, width // patch_size
        if (h * patch_size, w * patch_size) == size and h * w == num_tokens:
            return h, w
    raise DatasetError(
        f"{num_tokens} tokens are no grid of square patches of {height}x{width} px; choose a size "
        "that is a whole number of patches"
    )


@torch.inference_mode()
def _encode_part(
    samples: tuple[Sample, ...], encode: Encode, *, size: tuple[int, int], batch_size: int
) -> list[Tensor]:
    return list(_encode_all(samples, encode, size=size, batch_size=batch_size))


def evaluate_segmentation(
    dataset: SegmentationDataset,
    encode: Encode,
    *,
    size: tuple[int, int],
    batch_size: int = 16,
    settings: Sequence[ProbeSettings] = (ProbeSettings(),),
) -> list[SegmentationResult]:
    """Encode a data set once, then train and score linear probes on its tokens.

    Args:
        dataset: What to evaluate on.
        encode: Frozen backbone: uint8 images `[B, 3, H, W]` to patch tokens `[B, N, C]`.
        size: (height, width) to resize images to, in pixels; whole numbers of patches.
        batch_size: Images per call of `encode`.
        settings: Of each probe, as of several seeds.

    Returns:
        One result per entry of `settings`.
    """
    started = time.monotonic()
    train_tokens = _encode_part(dataset.train, encode, size=size, batch_size=batch_size)
    val_tokens = _encode_part(dataset.val, encode, size=size, batch_size=batch_size)
    encoded = time.monotonic()
    train_labels = [read_label(sample.label) for sample in dataset.train]
    val_labels = [read_label(sample.label) for sample in dataset.val]
    results = []
    for probe_settings in settings:
        probing = time.monotonic()
        probe = linear_probe(
            train_tokens,
            train_labels,
            val_tokens,
            val_labels,
            num_classes=len(dataset.classes),
            settings=probe_settings,
        )
        results.append(
            SegmentationResult(
                dataset=dataset.name,
                size=size,
                classes=dataset.classes,
                probe=probe,
                encode_seconds=encoded - started,
                probe_seconds=time.monotonic() - probing,
            )
        )
    return results
