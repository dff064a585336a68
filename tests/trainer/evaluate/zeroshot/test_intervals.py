import pytest
import torch

from trainer.evaluate.metrics import SegmentationMetric
from trainer.evaluate.zeroshot.intervals import (
    bootstrapped,
    class_iou,
    counts_of,
    mean_of,
    scores_of,
)


def random_counts(num_images=12, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    metric = SegmentationMetric(num_classes)
    counts = []
    for _ in range(num_images):
        truth, noise = torch.randint(0, 3, (2, 50), generator=generator)
        predicted = torch.where(torch.rand(50, generator=generator) < 0.6, truth, noise)
        one = SegmentationMetric(num_classes)
        for each in (metric, one):
            each.update(predicted, truth)
        counts.append(counts_of(one.confusion))
    return torch.stack(counts), metric.compute()


def test_the_value_is_that_of_the_metric():
    counts, expected = random_counts()

    miou, accuracy, pixels = (score.interval for score in scores_of(bootstrapped(counts), 12))

    assert miou.mean == pytest.approx(100 * expected.miou)
    assert accuracy.mean == pytest.approx(100 * expected.mean_accuracy)
    assert pixels.mean == pytest.approx(100 * expected.pixel_accuracy)
    assert miou.low < miou.mean < miou.high
    assert miou.count == 12
    found = class_iou(counts, ("a", "b", "c", "never"))
    assert found["a"] == pytest.approx(100 * expected.class_iou[0])
    assert found["never"] is None


def test_the_pixel_accuracys_interval_is_that_of_a_mean_over_images():
    # All images have as many pixels, so that it is one, and its deviation is known.
    counts, _ = random_counts(num_images=200)
    shares = 100 * counts[:, 0].sum(dim=1) / 50

    interval = scores_of(bootstrapped(counts), 200)[2].interval

    half = 1.96 * float(shares.std()) / 200**0.5
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_what_two_subjects_share_cancels_in_their_difference():
    counts, _ = random_counts()

    same = scores_of(bootstrapped(counts) - bootstrapped(counts), 12)[0].interval

    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_one_image_has_no_interval():
    counts, _ = random_counts(num_images=1)

    interval = scores_of(bootstrapped(counts), 1)[0].interval

    assert interval.low == interval.mean == interval.high
    assert interval.std == 0


def test_the_mean_of_data_sets_is_as_wide_as_if_they_were_the_same_images():
    counts = random_counts()[0]
    twice = [scores_of(bootstrapped(counts), len(counts))[0]] * 2

    mean = mean_of("mean", twice)

    assert mean.name == "mean"
    assert mean.interval.count == 24
    for end in ("mean", "std", "low", "high"):
        assert getattr(mean.interval, end) == pytest.approx(getattr(twice[0].interval, end))
