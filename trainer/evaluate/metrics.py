"""Scores of dense predictions: counted by torchmetrics, gathered as each benchmark's field does.

Segmentation follows mmsegmentation (and so DINOv2): one confusion matrix over all pixels of all
images that are not `IGNORE`. A class that is neither in the labels nor predicted is left out of the
mIoU; one that is only predicted counts with IoU 0. The mean accuracy is over the classes that the
labels hold. Depth follows BTS (arXiv:1907.10326) and AdaBins (arXiv:2011.14141), whose code DINOv2
uses: scores of each image over its measured pixels, then their mean over images.

Dimension key: H, W = pixels, K = classes, P = pixels that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional import mean_absolute_percentage_error, mean_squared_error

from backbone.errors import RefineryError
from trainer.evaluate.datasets import IGNORE

DELTA = 1.25  # Eigen et al. 2014, arXiv:1406.2283


class MetricError(RefineryError):
    """Predictions that cannot be scored against their truth."""


@dataclass(frozen=True)
class SegmentationScores:
    """Scores over all label pixels that are not `IGNORE`; shares, 0 to 1.

    Attributes:
        miou: Mean intersection over union of the classes that are in the labels or predicted.
        mean_accuracy: Mean recall of the classes that are in the labels.
        pixel_accuracy: Share of pixels that are right.
        class_iou: Per class; None where the class is neither in the labels nor predicted.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: tuple[float | None, ...]


class SegmentationMetric:
    """Counts predictions image by image: `update` each, then `compute`."""

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # Validation would sort every pixel of every image; `update` checks what it needs itself.
        self._jaccard = MulticlassJaccardIndex(
            num_classes, average="none", ignore_index=IGNORE, validate_args=False
        ).to(device)
        self._num_known = 0

    def update(self, predicted_HW: Tensor, label_HW: Tensor) -> None:
        """Count one image (or any pixels of it).

        Args:
            predicted_HW: Class numbers, integer, any shape.
            label_HW: Class numbers or `IGNORE`, of the same shape.

        Raises:
            MetricError: The shapes differ, or the label holds a class that does not exist.
        """
        if predicted_HW.shape != label_HW.shape:
            raise MetricError(
                f"the prediction is {list(predicted_HW.shape)}, its label {list(label_HW.shape)}; "
                "upsample logits to the label's size"
            )
        known_P = label_HW != IGNORE
        num_known = int(known_P.sum())
        if not num_known:
            return
        truth_P = label_HW[known_P].long()
        if int(truth_P.max()) >= self.num_classes or int(truth_P.min()) < 0:
            raise MetricError(
                f"a label holds class {int(truth_P.max())}; classes are 0 to "
                f"{self.num_classes - 1}, and {IGNORE} for 'ignore'"
            )
        self._num_known += num_known
        self._jaccard.update(predicted_HW[known_P].long(), truth_P)

    @property
    def confusion(self) -> Tensor:
        """Pixel counts `[K, K]`, truth in rows and prediction in columns; int64."""
        confusion = self._jaccard.confmat
        assert isinstance(confusion, Tensor)
        return confusion

    def compute(self) -> SegmentationScores:
        """Scores of everything counted so far.

        Raises:
            MetricError: No pixel counted: every label is 'ignore'.
        """
        if not self._num_known:
            raise MetricError("no label pixel to score: every one is 'ignore'")
        iou_K = self._jaccard.compute().double().cpu()
        confusion_KK = self.confusion.double().cpu()
        hit_K, truth_K = confusion_KK.diagonal(), confusion_KK.sum(dim=1)
        has_union_K = truth_K + confusion_KK.sum(dim=0) > 0
        in_truth_K = truth_K > 0
        return SegmentationScores(
            miou=float(iou_K[has_union_K].mean()),
            mean_accuracy=float((hit_K / truth_K)[in_truth_K].mean()),
            pixel_accuracy=float(hit_K.sum() / truth_K.sum()),
            class_iou=tuple(
                iou if is_met else None
                for iou, is_met in zip(iou_K.tolist(), has_union_K.tolist(), strict=True)
            ),
        )


@dataclass(frozen=True)
class DepthScores:
    """Scores over measured pixels.

    Attributes:
        rmse: Root mean squared error in metres, per image, then the mean over images.
        abs_rel: Mean of |prediction - truth| / truth, per image, then the mean over images.
        delta_1: Share of pixels with max(prediction/truth, truth/prediction) < 1.25, 0 to 1, per
            image, then the mean over images.
        rmse_all_pixels: Root mean squared error in metres over all pixels of all images at once.
    """

    rmse: float
    abs_rel: float
    delta_1: float
    rmse_all_pixels: float


def delta_1(predicted_P: Tensor, truth_P: Tensor) -> float:
    """Share of pixels whose ratio to the truth, either way, is below 1.25; both positive.

    Source: Eigen et al. 2014, arXiv:1406.2283, section 4.
    """
    ratio_P = torch.maximum(predicted_P / truth_P, truth_P / predicted_P)
    return float((ratio_P < DELTA).double().mean())


class DepthMetric:
    """Scores depth maps image by image: `update` each, then `compute`.

    Args:
        min_depth: In metres, above 0; pixels measured nearer do not count.
        max_depth: In metres; pixels measured farther do not count.
    """

    def __init__(self, min_depth: float, max_depth: float) -> None:
        if not 0 < min_depth < max_depth:
            raise MetricError(
                f"depths from {min_depth} to {max_depth} m: the nearest must be above 0 and below "
                "the farthest"
            )
        self.min_depth, self.max_depth = min_depth, max_depth
        # Of a whole data set: a sum in float32 would lose digits with every image.
        self._all_pixels = MeanSquaredError(squared=False).set_dtype(torch.float64)
        self._per_image: list[tuple[float, float, float]] = []

    def measured(self, truth_HW: Tensor, mask_HW: Tensor | None = None) -> Tensor:
        """Which pixels count: measured within the range and inside the mask; bool `[H, W]`."""
        is_measured_HW = (truth_HW > self.min_depth) & (truth_HW < self.max_depth)
        return is_measured_HW if mask_HW is None else is_measured_HW & mask_HW

    def update(self, predicted_HW: Tensor, truth_HW: Tensor, mask_HW: Tensor | None = None) -> None:
        """Score one image; predictions are clamped to the range of depths.

        Args:
            predicted_HW: Metres, float.
            truth_HW: Metres, 0 = no measurement, of the same shape.
            mask_HW: Where to score, bool; None for everywhere.

        An image without a pixel that counts is left out.

        Raises:
            MetricError: The shapes differ, or a prediction is not finite.
        """
        if predicted_HW.shape != truth_HW.shape:
            raise MetricError(
                f"the prediction is {list(predicted_HW.shape)}, its truth {list(truth_HW.shape)}; "
                "upsample depths to the truth's size"
            )
        counts_HW = self.measured(truth_HW, mask_HW)
        predicted_P = predicted_HW[counts_HW].double().cpu()
        truth_P = truth_HW[counts_HW].double().cpu()
        if not truth_P.numel():
            return
        if not bool(torch.isfinite(predicted_P).all()):
            raise MetricError("a predicted depth is not finite")
        predicted_P = predicted_P.clamp(self.min_depth, self.max_depth)
        self._all_pixels.update(predicted_P, truth_P)
        self._per_image.append(
            (
                float(mean_squared_error(predicted_P, truth_P, squared=False)),
                float(mean_absolute_percentage_error(predicted_P, truth_P)),
                delta_1(predicted_P, truth_P),
            )
        )

    def compute(self) -> DepthScores:
        """Scores of the images so far.

        Raises:
            MetricError: No image has a pixel that counts.
        """
        if not self._per_image:
            raise MetricError(
                f"no depth to score: no pixel is measured from {self.min_depth} to "
                f"{self.max_depth} m"
            )
        rmse, abs_rel, delta = (
            sum(values) / len(values) for values in zip(*self._per_image, strict=True)
        )
        return DepthScores(rmse, abs_rel, delta, float(self._all_pixels.compute()))
