"""A linear probe on frozen dense features: normalisation, one linear layer, segmentation.

The protocol is DINOv2's linear evaluation of semantic segmentation (arXiv:2304.07193, section 7.4,
and the head of its published configuration): batch normalisation and a 1x1 convolution on the last
layer's patch tokens, logits upsampled bilinearly to the label's size, cross entropy that ignores
255, AdamW with linear warm-up and linear decay. Several learning rates train at once on the same
batches, one head each, and the best on val counts, as in DINOv2's linear evaluation; the choice is
made on the images that are scored, for raw and refined features alike.

Differs: features are computed once, so there is no augmentation; the statistics of the
normalisation are those of the whole training part (see `points.Normalization`); a step takes the
loss at some of the label's pixels, where DINOv2 takes it at all of them (see `points`), and there
are fewer, larger steps. Scores are taken at every label pixel.

Dimension key: C = channels, h, w = token grid, H, W = pixels, P = points, R = learning rates,
K = classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluate.datasets import IGNORE
from trainer.evaluate.heads import Heads, fit_heads, warn_of_edge
from trainer.evaluate.metrics import SegmentationMetric, SegmentationScores
from trainer.evaluate.points import (
    Normalization,
    NormalizationKind,
    Points,
    ProbeError,
    check_parts,
    draw_points,
    features_at,
    held,
)
from trainer.evaluate.progress import Advance

logger = logging.getLogger(__name__)

# Labelled pixels drawn of each image, once: to learn from, and to choose the best head by.
DRAWN_PER_IMAGE = 4096


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe is trained; the defaults converge on a few hundred images.

    Twice as many steps change the mIoU of CamVid by less than seeds do; see `Normalization.fit`.

    Attributes:
        learning_rates: AdamW learning rates, one head each.
        num_steps: Optimiser steps.
        batch_size: Images per step.
        points_per_image: Labelled pixels of each image in a step.
        weight_decay: On the linear layer; DINOv2's.
        normalization: `batch` is DINOv2's; `whitening` gets to the same in fewer steps.
        seed: Of the heads' weights, the pixels and the order of images.
    """

    learning_rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    num_steps: int = 5000
    batch_size: int = 16
    points_per_image: int = 128
    weight_decay: float = 1e-4
    normalization: NormalizationKind = "batch"
    seed: int = 0


@dataclass(frozen=True)
class SegmentationProbe:
    """The best head's scores, and the mIoU of every learning rate.

    Attributes:
        scores: Of the best head, at every pixel of val.
        best_learning_rate: The one whose head scored highest.
        miou_by_learning_rate: 0 to 1, in the order of the settings; at the few thousand pixels of
            each image of val that the best head is chosen at.
        is_at_edge: Whether the best learning rate is the smallest or the largest of several.
    """

    scores: SegmentationScores
    best_learning_rate: float
    miou_by_learning_rate: dict[float, float]
    is_at_edge: bool


def segmentation_probe(
    train_grids: Sequence[Tensor],
    train_labels: Sequence[Tensor],
    val_grids: Sequence[Tensor],
    val_labels: Sequence[Tensor],
    *,
    num_classes: int,
    settings: ProbeSettings | None = None,
    device: torch.device | str = "cpu",
    advance: Advance | None = None,
) -> SegmentationProbe:
    """Train the probe on one part and score it on the other.

    Args:
        train_grids: Features `[h, w, C]` per image, any float dtype; sizes may differ. What a
            sequence reads from disk is held in memory if it fits.
        train_labels: A label map `[H, W]` of class numbers per image, any size; 255 is ignored.
        val_grids: As `train_grids`.
        val_labels: As `train_labels`.
        num_classes: Classes are numbered from 0.
        settings: How to train.
        device: Where to train and score.
        advance: Told of each step of training and each image scored.

    Raises:
        ProbeError: Features and labels do not fit each other, or there is nothing to learn.
        MetricError: The val part has no pixel to score, or classes that do not exist.
    """
    settings = settings or ProbeSettings()
    device = torch.device(device)
    train_grids, val_grids = held(train_grids, device), held(val_grids, device)
    check_parts(train_grids, train_labels, val_grids, val_labels)
    generator = torch.Generator().manual_seed(settings.seed)
    points = _points(train_labels, num_classes, "train", generator)
    val_points = _points(val_labels, num_classes, "val", generator)
    normalize, heads = fit_heads(
        train_grids,
        points,
        num_classes,
        _cross_entropy,
        settings,
        generator=generator,
        device=device,
        advance=advance,
    )
    coarse = _miou_at_points(heads, normalize, val_grids, val_points, device)
    best = coarse.index(max(coarse))
    learning_rate = settings.learning_rates[best]
    by_rate = dict(zip(settings.learning_rates, coarse, strict=True))
    shown = ", ".join(f"{rate:g} {100 * miou:.1f} %" for rate, miou in by_rate.items())
    logger.info("mIoU by learning rate: %s", shown)
    metric = SegmentationMetric(num_classes, device=device)
    for grid_hwC, label_HW in zip(val_grids, val_labels, strict=True):
        metric.update(*_predict(heads, normalize, grid_hwC, label_HW, only=best, device=device))
        if advance is not None:
            advance(1)
    return SegmentationProbe(
        scores=metric.compute(),
        best_learning_rate=learning_rate,
        miou_by_learning_rate=by_rate,
        is_at_edge=warn_of_edge("segmentation probe", learning_rate, settings.learning_rates),
    )


def _points(
    labels: Sequence[Tensor], num_classes: int, part: str, generator: torch.Generator
) -> list[Points]:
    points = []
    for index, label_HW in enumerate(labels):
        if label_HW.ndim != 2:
            raise ProbeError(
                f"label {index} of the {part} part is {list(label_HW.shape)}; it must be [H, W]"
            )
        is_known_HW = label_HW != IGNORE
        known = label_HW[is_known_HW]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
            raise ProbeError(
                f"label {index} of the {part} part holds class {int(known.max())}; classes are 0 "
                f"to {num_classes - 1}, and {IGNORE} for 'ignore'"
            )
        points.append(
            draw_points(label_HW, is_known_HW, generator, most=DRAWN_PER_IMAGE, weigh=True)
        )
    if not any(len(some.position_P) for some in points):
        raise ProbeError(f"every {part} label is 'ignore'")
    return points


def _cross_entropy(logits_PRK: Tensor, target_P: Tensor) -> Tensor:
    target_PR = target_P.long()[:, None].expand(-1, logits_PRK.shape[1])
    total = F.cross_entropy(logits_PRK.flatten(0, 1), target_PR.flatten(), reduction="sum")
    return total / len(target_P)


@torch.inference_mode()
def _miou_at_points(
    heads: Heads,
    normalize: Normalization,
    grids: Sequence[Tensor],
    points: Sequence[Points],
    device: torch.device,
) -> list[float]:
    """mIoU of every head at the points drawn of each image."""
    num_classes = len(heads.biases[0])
    metrics = [SegmentationMetric(num_classes, device=device) for _ in heads.biases]
    for grid_hwC, some in zip(grids, points, strict=True):
        if not len(some.position_P):
            continue
        features_PC = features_at([grid_hwC], [some], device)
        predicted_PR = heads(normalize(features_PC)).argmax(dim=-1)
        target_P = some.target_P.to(device)
        for metric, predicted_P in zip(metrics, predicted_PR.unbind(dim=1), strict=True):
            metric.update(predicted_P, target_P)
    return [metric.compute().miou for metric in metrics]


@torch.inference_mode()
def _predict(
    heads: Heads,
    normalize: Normalization,
    grid_hwC: Tensor,
    label_HW: Tensor,
    *,
    only: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Class numbers of one head and the label, both `[H, W]` on the device."""
    h, w, _ = grid_hwC.shape
    logits_NK = heads(normalize(grid_hwC.to(device).flatten(0, 1)), only=only)[:, 0]
    upsampled_1KHW = F.interpolate(
        logits_NK.T.reshape(1, -1, h, w),
        size=(label_HW.shape[0], label_HW.shape[1]),
        mode="bilinear",
        align_corners=False,
    )
    return upsampled_1KHW[0].argmax(dim=0), label_HW.to(device)
