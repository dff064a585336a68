"""Semantic segmentation by a linear probe: raw and refined features on a labelled data set.

result = evaluate_segmentation(dataset, subjects, store=store, size=(352, 480), ...)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from pydantic import JsonValue

from trainer.evaluate.datasets import SegmentationDataset
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import Size
from trainer.evaluate.probe import ProbeSettings, SegmentationProbe, segmentation_probe
from trainer.evaluate.probing import Parts, check_dataset, describe_all, probe_all, targets
from trainer.evaluate.progress import SILENT, Advance, Progress
from trainer.evaluate.results import CLASS_IOU, Result, Row, new_result, score
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows

_NORMALIZATION = {
    "batch": "batch normalisation by the statistics of train",
    "whitening": "whitening by the statistics of train (DINOv2: batch normalisation)",
}


def evaluate_segmentation(
    dataset: SegmentationDataset,
    subjects: Sequence[Subject],
    *,
    store: FeatureStore,
    size: Size,
    windows: Windows | None = None,
    batch_size: int = 16,
    settings_by_seed: Sequence[ProbeSettings] = (ProbeSettings(),),
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> Result:
    """Train and score a linear probe for every subject and seed.

    Features and finished probes are kept in the store: a run that was killed goes on.

    Args:
        dataset: Has both parts, train and val.
        subjects: Raw first.
        store: Keeps features.
        size: Of images, see `FeatureStore.features`.
        windows: See `encode_grid`.
        batch_size: Most images encoded at once.
        settings_by_seed: Of each probe; they differ by their seed.
        device: Where probes are trained.
        progress: Is told how far this is.

    Raises:
        RefineryError: Data, features or settings that no probe can be trained on.
    """
    started = time.monotonic()
    check_dataset(dataset, subjects, settings_by_seed)
    train_labels = targets(dataset.train, dataset.read_label)
    val_labels = targets(dataset.val, dataset.read_label)

    def measure(parts: Parts, settings: ProbeSettings, advance: Advance) -> SegmentationProbe:
        return segmentation_probe(
            parts.train_grids,
            train_labels,
            parts.val_grids,
            val_labels,
            num_classes=len(dataset.classes),
            settings=settings,
            device=device,
            advance=advance,
        )

    probed = probe_all(
        dataset,
        subjects,
        SegmentationProbe,
        measure,
        store=store,
        size=size,
        windows=windows,
        batch_size=batch_size,
        settings_by_seed=settings_by_seed,
        decides={"layout": dataset.layout, "classes": list(dataset.classes)},
        device=device,
        progress=progress,
    )
    return new_result(
        task="segmentation",
        dataset=dataset.name,
        protocol=_protocol(dataset, settings_by_seed[0]),
        settings=describe_all(settings_by_seed, size, windows),
        rows=[_row(subject, probes, dataset.classes) for subject, probes in probed],
        seconds=time.monotonic() - started,
    )


def _protocol(dataset: SegmentationDataset, settings: ProbeSettings) -> str:
    return (
        "Linear probe on frozen patch tokens of the last layer after DINOv2 (arXiv:2304.07193, "
        f"section 7.4): {_NORMALIZATION[settings.normalization]}, a 1x1 convolution, logits "
        f"upsampled bilinearly to the label, trained on {len(dataset.train)} images without "
        f"augmentation and scored at every labelled pixel of {len(dataset.val)}; of "
        f"{len(settings.learning_rates)} learning rates the best on these same images counts, as "
        "is the field's habit, for raw and refined alike."
    )


def _row(subject: Subject, probes: Sequence[SegmentationProbe], classes: Sequence[str]) -> Row:
    scores = [probe.scores for probe in probes]
    class_iou: dict[str, JsonValue] = {
        name: _mean_percent([each.class_iou[number] for each in scores])
        for number, name in enumerate(classes)
    }
    rates: list[JsonValue] = [probe.best_learning_rate for probe in probes]
    by_rate: list[JsonValue] = [
        {f"{rate:g}": 100 * miou for rate, miou in probe.miou_by_learning_rate.items()}
        for probe in probes
    ]
    return Row(
        subject=subject.name,
        spec=subject.spec,
        digest=subject.digest,
        scores=(
            score("mIoU", [100 * s.miou for s in scores], better="higher", unit="percent"),
            score("mAcc", [100 * s.mean_accuracy for s in scores], better="higher", unit="percent"),
            score(
                "pixel accuracy",
                [100 * s.pixel_accuracy for s in scores],
                better="higher",
                unit="percent",
            ),
        ),
        details={
            CLASS_IOU: class_iou,
            "best_learning_rates": rates,
            "miou_by_learning_rate": by_rate,
            "at_edge_of_learning_rates": any(probe.is_at_edge for probe in probes),
        },
    )


def _mean_percent(values: Sequence[float | None]) -> float | None:
    """Over the seeds in which the class was met."""
    met = [value for value in values if value is not None]
    return 100 * sum(met) / len(met) if met else None
