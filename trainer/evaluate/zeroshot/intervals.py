"""Segmentation scores with bootstrap intervals over images, of one subject and of two together.

The mIoU of a data set is no mean of values per image, so images are drawn with their counts: every
draw is a data set of as many images, scored as a whole. The same draws are taken for all subjects:
what differs between draws and not between subjects cancels in their difference.

Dimension key: I = images, D = draws, K = classes; counts are hits, pixels of the class, and pixels
predicted as it, [I, 3, K].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.intervals import Interval
from trainer.evaluate.results import Score

NUM_DRAWS = 1000
_NAMES = ("mIoU", "mAcc", "pixel accuracy")


def counts_of(confusion_KK: Tensor) -> Tensor:
    """Hits, truth and predictions of a confusion matrix (truth in rows), float64 `[3, K]`."""
    confusion_KK = confusion_KK.double().cpu()
    return torch.stack([confusion_KK.diagonal(), confusion_KK.sum(dim=1), confusion_KK.sum(dim=0)])


def bootstrapped(counts_I3K: Tensor, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Tensor:
    """Scores of all images, then of every draw: float64 `[1 + D, 3]`, percent.

    As `trainer.evaluate.metrics` has them: mean IoU of the classes that are in the labels or
    predicted, mean recall of those in the labels, share of pixels that are right.
    """
    num_images = len(counts_I3K)
    generator = np.random.default_rng(seed)
    drawn_DI = generator.multinomial(num_images, [1 / num_images] * num_images, size=num_draws)
    weights = torch.cat([torch.ones(1, num_images, dtype=torch.float64), torch.tensor(drawn_DI)])
    total_D3K = (weights @ counts_I3K.flatten(1)).reshape(len(weights), 3, -1)
    hit_DK, truth_DK, predicted_DK = total_D3K.unbind(1)
    union_DK = truth_DK + predicted_DK - hit_DK
    return 100 * torch.stack(
        [
            _mean_where(hit_DK / union_DK, union_DK > 0),
            _mean_where(hit_DK / truth_DK, truth_DK > 0),
            hit_DK.sum(dim=1) / truth_DK.sum(dim=1).clamp(min=1),
        ],
        dim=1,
    )


def scores_of(values: Tensor, num_images: int) -> tuple[Score, ...]:
    """Scores of `bootstrapped`, or of the difference of two."""
    found = []
    for number, name in enumerate(_NAMES):
        value, draws = float(values[0, number]), values[1:, number].numpy()
        low, high = np.percentile(draws, (2.5, 97.5)) if num_images > 1 else (value, value)
        std = float(draws.std()) if num_images > 1 else 0.0
        interval = Interval(value, std, float(low), float(high), num_images)
        found.append(
            Score(name=name, unit="percent", better="higher", interval=interval, values=(value,))
        )
    return tuple(found)


def mean_of(name: str, scores: Sequence[Score]) -> Score:
    """The mean of one score of several data sets, with the mean of their intervals.

    That is how wide it is if all vary together, and wider than need be otherwise: VOC20 and VOC21
    are the same images, and so are Context59 and 60, COCO-Stuff and COCO-Object.
    """
    found = [one.interval for one in scores]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(found)

    interval = Interval(
        mean=mean(one.mean for one in found),
        std=mean(one.std for one in found),
        low=mean(one.low for one in found),
        high=mean(one.high for one in found),
        count=sum(one.count for one in found),
    )
    update = {"name": name, "interval": interval, "values": (interval.mean,)}
    return scores[0].model_copy(update=update)


def class_iou(counts_I3K: Tensor, names: tuple[str, ...]) -> Mapping[str, float | None]:
    """IoU of every class in percent; None where it is neither in the labels nor predicted."""
    hit_K, truth_K, predicted_K = counts_I3K.sum(dim=0)
    union_K = truth_K + predicted_K - hit_K
    return {
        name: 100 * hit / union if union else None
        for name, hit, union in zip(names, hit_K.tolist(), union_K.tolist(), strict=True)
    }


def _mean_where(values_DK: Tensor, counts_DK: Tensor) -> Tensor:
    total_D = torch.where(counts_DK, values_DK, 0.0).sum(dim=1)
    return total_D / counts_DK.sum(dim=1).clamp(min=1)
