"""Open-vocabulary segmentation of one data set, and the table of several.

Dimension key: B = images, h, w = token grid, P = channels of an embedding, Q = names, K = classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backbone.value_path import ValuePath
from trainer.evaluate import images
from trainer.evaluate.datasets import SegmentationDataset
from trainer.evaluate.encoding import encode_files
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import Size
from trainer.evaluate.metrics import SegmentationMetric
from trainer.evaluate.progress import SILENT, Progress
from trainer.evaluate.results import CLASS_IOU, MEAN, Result, Row, new_result
from trainer.evaluate.windows import Windows
from trainer.evaluate.zeroshot.aligned import AlignedSubject
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.intervals import (
    bootstrapped,
    class_iou,
    counts_of,
    mean_of,
    scores_of,
)
from trainer.evaluate.zeroshot.labelling import label_map
from trainer.evaluate.zeroshot.tokens import Family
from trainer.evaluate.zeroshot.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pydantic import JsonValue

_PATHS: Mapping[ValuePath, str] = {
    "attention": "the last block's value path (MaskCLIP, arXiv:2112.01071) without its residual "
    "and MLP (ClearCLIP, arXiv:2407.12442)",
    "block": "the last block's value path (MaskCLIP, arXiv:2112.01071) with its residual and MLP",
    "none": "tokens of the last block as they are",
}
_HEADS: Mapping[Family, str] = {
    "clip": "the final norm and the tower's projection",
    "siglip": "the final norm and the value path of the tower's attention pooling (as MaskCLIP, "
    "arXiv:2112.01071, takes that of CLIP's ResNets)",
}


@dataclass(frozen=True, kw_only=True)
class ZeroshotSettings:
    """How images are encoded and pixels decided.

    Attributes:
        size: Of the encoded images.
        windows: Square windows that they are encoded by; None: at once.
        path: Of the tokens, which the protocol names.
        family: Of the text tower, likewise.
        scale: Cosines are multiplied by it; decides nothing without a threshold.
        threshold: Probability under which a pixel is background; None: no such rule.
        batch_size: Most images that are encoded at once.
        notes: What else decides the scores, for the result: text tower, templates.
    """

    size: Size
    windows: Windows | None
    path: ValuePath
    family: Family
    scale: float = 40.0
    threshold: float | None = None
    batch_size: int = 8
    notes: Mapping[str, JsonValue]


def evaluate_zeroshot(
    dataset: SegmentationDataset,
    vocabulary: Vocabulary,
    embeddings_QP: Tensor,
    subjects: Sequence[AlignedSubject],
    *,
    settings: ZeroshotSettings,
    store: FeatureStore | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Segment the images of `dataset.val` by the names that fit their patches best.

    Args:
        dataset: Labels are read at their own size, and predictions upsampled to it.
        vocabulary: Of this data set.
        embeddings_QP: Unit embeddings of its names.
        subjects: Raw first, then refined.
        settings: See there.
        store: Keeps embeddings of patches; None: they are used once and let go.
        progress: Is told how far this is.

    Returns:
        mIoU, mean accuracy and pixel accuracy, with bootstrap intervals over images; the rows of
        differences by the same draws.

    Raises:
        RefineryError: images or labels that cannot be read, or sizes that patches do not divide.
    """
    started = time.monotonic()
    if settings.threshold is not None and vocabulary.background is None:
        raise ZeroshotError(
            f"{dataset.name} has no background class that a threshold could decide; leave it out"
        )
    for subject in subjects:
        images.check_size(settings.size, subject.patch_size, subject.name)
        if settings.windows is not None:
            settings.windows.check(subject.patch_size)
    rows: list[Row] = []
    draws: list[Tensor] = []
    for subject in subjects:
        counts_I3K = _counts(
            dataset, vocabulary, embeddings_QP, subject, settings, store=store, progress=progress
        )
        values = bootstrapped(counts_I3K)
        draws.append(values)
        rows.append(
            Row(
                subject=subject.name,
                spec=subject.spec,
                digest=subject.digest,
                scores=scores_of(values, len(dataset.val)),
                details={CLASS_IOU: dict(class_iou(counts_I3K, dataset.classes))},
            )
        )
    differences = [
        Row(
            subject=f"{row.subject} minus {rows[0].subject}",
            scores=scores_of(later - draws[0], len(dataset.val)),
        )
        for row, later in zip(rows[1:], draws[1:], strict=True)
    ]
    return new_result(
        task="zeroshot",
        dataset=dataset.name,
        protocol=f"Open-vocabulary segmentation without training: {_PATHS[settings.path]}, through "
        f"{_HEADS[settings.family]}; every pixel is of the class whose name, a mean over prompts, "
        "has the largest cosine, upsampled bilinearly; scores over all pixels.",
        settings={
            **settings.notes,
            "images": len(dataset.val),
            "size": _size_note(settings.size),
            "window": list(settings.windows) if settings.windows else "none",
            "names": len(vocabulary.names),
            "background": vocabulary.rule,
            "threshold": settings.threshold if settings.threshold is not None else "none",
            "scale": settings.scale,
        },
        rows=[*rows, *differences],
        seconds=time.monotonic() - started,
    )


def benchmark_table(results: Sequence[Result]) -> Result:
    """The mIoU of several data sets in one table, with their mean, as papers print it."""
    first = results[0]
    rows = []
    for number, row in enumerate(first.rows):
        miou = [result.rows[number].scores[0] for result in results]
        named = [
            each.model_copy(update={"name": result.dataset})
            for each, result in zip(miou, results, strict=True)
        ]
        details: dict[str, JsonValue] = {
            result.dataset: {
                **{each.name: each.interval.mean for each in result.rows[number].scores},
                **result.rows[number].details,
            }
            for result in results
        }
        rows.append(
            row.model_copy(
                update={
                    "scores": (*named, mean_of(MEAN, miou)),
                    "details": details,
                }
            )
        )
    names = [result.dataset for result in results]
    return new_result(
        task="zeroshot",
        dataset=", ".join(names),
        protocol=first.protocol + " mIoU of every data set, and their mean.",
        settings=_merged(results),
        rows=rows,
        seconds=sum(result.seconds for result in results),
    )


def _merged(results: Sequence[Result]) -> dict[str, JsonValue]:
    """Settings that all share as they are, and the others by data set."""
    merged: dict[str, JsonValue] = {}
    for key, value in results[0].settings.items():
        values = {result.dataset: result.settings[key] for result in results}
        is_shared = all(each == value for each in values.values())
        merged[key] = (
            value
            if is_shared
            else ", ".join(f"{name} {_text(each)}" for name, each in values.items())
        )
    return merged


def _text(value: JsonValue) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _size_note(size: Size) -> JsonValue:
    return list(size) if isinstance(size, tuple) else f"short side {size.pixels}"


def _counts(
    dataset: SegmentationDataset,
    vocabulary: Vocabulary,
    embeddings_QP: Tensor,
    subject: AlignedSubject,
    settings: ZeroshotSettings,
    *,
    store: FeatureStore | None,
    progress: Progress,
) -> Tensor:
    """Hits, truth and predictions of every image, `[I, 3, K]`."""
    metric = SegmentationMetric(vocabulary.num_classes)
    counts_I3K = torch.zeros(len(dataset.val), 3, vocabulary.num_classes, dtype=torch.float64)
    before_KK = metric.confusion.clone()
    grids = _grids(dataset, subject, settings, store=store, progress=progress)
    title = f"{dataset.name} {subject.name}"
    with progress.stage(title, len(dataset.val)) as advance:
        for index, grid_hwP in grids:
            label_HW = dataset.read_label(dataset.val[index])
            height, width = label_HW.shape
            predicted_HW = label_map(
                grid_hwP.float() @ embeddings_QP.T,
                vocabulary,
                (height, width),
                scale=settings.scale,
                threshold=settings.threshold,
            )
            metric.update(predicted_HW, label_HW)
            counts_I3K[index] = counts_of(metric.confusion - before_KK)
            before_KK = metric.confusion.clone()
            advance(1)
    metric.compute()  # refuses a data set without a pixel to score
    return counts_I3K


def _grids(
    dataset: SegmentationDataset,
    subject: AlignedSubject,
    settings: ZeroshotSettings,
    *,
    store: FeatureStore | None,
    progress: Progress,
) -> Iterator[tuple[int, Tensor]]:
    """Index and embeddings `[h, w, P]` of every image, in any order."""
    if store is not None:
        found = store.features(
            subject,
            dataset.val,
            size=settings.size,
            windows=settings.windows,
            batch_size=settings.batch_size,
            progress=progress,
        )
        yield from enumerate(found)
        return
    files = []
    for sample in dataset.val:
        original = images.original_size(sample.image, images.read_bytes(sample.image))
        files.append((sample.image, images.resolve(settings.size, original, subject.patch_size)))
    for batch, grids_BhwP in encode_files(
        subject, files, windows=settings.windows, batch_size=settings.batch_size
    ):
        yield from zip(batch, grids_BhwP, strict=True)
