import math

import pytest
import torch

from trainer.evaluate.metrics import DepthMetric, MetricError, SegmentationMetric, delta_1


def segmentation(pairs: list[tuple[int, int]], num_classes: int = 3) -> SegmentationMetric:
    """A metric of (truth, prediction) pixels, each its own image."""
    metric = SegmentationMetric(num_classes)
    for truth, predicted in pairs:
        metric.update(torch.tensor([[predicted]]), torch.tensor([[truth]], dtype=torch.uint8))
    return metric


def test_scores_are_those_counted_by_hand():
    # truth 0: three right, one taken for 1; truth 1: four right; class 2 nowhere.
    scores = segmentation([(0, 0)] * 3 + [(0, 1)] + [(1, 1)] * 4).compute()

    assert scores.class_iou[:2] == pytest.approx((3 / 4, 4 / 5))
    assert scores.class_iou[2] is None
    assert scores.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1) / 2)
    assert scores.pixel_accuracy == pytest.approx(7 / 8)


def test_a_class_that_is_only_predicted_counts_with_iou_zero_but_has_no_accuracy():
    scores = segmentation([(0, 0), (0, 2), (1, 1)]).compute()

    assert scores.class_iou == pytest.approx((1 / 2, 1, 0))
    assert scores.miou == pytest.approx(1 / 2)
    assert scores.mean_accuracy == pytest.approx(3 / 4)


def test_ignored_pixels_count_nowhere():
    with_ignored = segmentation([(0, 0), (1, 0), (255, 2), (255, 0)]).compute()

    assert with_ignored == segmentation([(0, 0), (1, 0)]).compute()


def test_the_confusion_matrix_has_truth_in_rows():
    metric = segmentation([(0, 1), (0, 1), (2, 0)])

    assert metric.confusion.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_images_of_different_sizes_are_pooled_by_pixel():
    metric = SegmentationMetric(2)
    metric.update(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.uint8))
    metric.update(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.uint8))

    assert metric.compute().pixel_accuracy == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("predicted", "label", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 3), r"prediction is \[2, 2\], its label \[2, 3\]"),
        (torch.zeros(1, 1), torch.full((1, 1), 7), "holds class 7; classes are 0 to 2"),
    ],
)
def test_what_cannot_be_counted_is_named(predicted, label, message):
    with pytest.raises(MetricError, match=message):
        SegmentationMetric(3).update(predicted, label)


def test_nothing_but_ignored_pixels_is_no_score():
    with pytest.raises(MetricError, match="no label pixel to score"):
        segmentation([(255, 0)]).compute()


def test_depth_scores_are_those_computed_by_hand():
    metric = DepthMetric(0.1, 10.0)
    metric.update(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 3.0]]))
    metric.update(torch.tensor([[4.5]]), torch.tensor([[4.0]]))

    scores = metric.compute()

    first = math.sqrt((1 + 0) / 2)
    assert scores.rmse == pytest.approx((first + 0.5) / 2)
    assert scores.abs_rel == pytest.approx(((1 / 2 + 0) / 2 + 0.5 / 4) / 2)
    assert scores.delta_1 == pytest.approx((1 / 2 + 1) / 2)
    assert scores.rmse_all_pixels == pytest.approx(math.sqrt((1 + 0 + 0.25) / 3))


def test_delta_1_is_strict_and_the_same_either_way():
    truth = torch.tensor([1.0, 1.25, 1.0, 1.24])
    predicted = torch.tensor([1.25, 1.0, 1.24, 1.0])

    assert delta_1(predicted, truth) == 0.5


def test_only_pixels_measured_within_range_and_mask_count():
    truth = torch.tensor([[0.0, 2.0, 20.0, 2.0]])
    predicted = torch.tensor([[9.0, 2.0, 9.0, 9.0]])
    metric = DepthMetric(0.1, 10.0)

    metric.update(predicted, truth, torch.tensor([[True, True, True, False]]))

    assert metric.compute().rmse == 0.0


def test_predictions_are_clamped_to_the_range():
    metric = DepthMetric(1.0, 10.0)
    metric.update(torch.tensor([[50.0, -3.0]]), torch.tensor([[9.0, 2.0]]))

    assert metric.compute().rmse == pytest.approx(1.0)


def test_an_image_without_measurement_is_left_out_and_nothing_else_is_no_score():
    metric = DepthMetric(0.1, 10.0)
    metric.update(torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(MetricError, match=r"no pixel is measured from 0\.1 to 10\.0 m"):
        metric.compute()

    metric.update(torch.full((2, 2), 2.0), torch.ones(2, 2))

    assert metric.compute().rmse == 1.0


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 3), r"prediction is \[2, 2\], its truth \[2, 3\]"),
        (torch.full((1, 1), torch.nan), torch.ones(1, 1), "not finite"),
    ],
)
def test_depths_that_cannot_be_scored_are_named(predicted, truth, message):
    with pytest.raises(MetricError, match=message):
        DepthMetric(0.1, 10.0).update(predicted, truth)


@pytest.mark.parametrize(("nearest", "farthest"), [(0.0, 10.0), (5.0, 5.0)])
def test_an_empty_range_of_depths_is_refused(nearest, farthest):
    with pytest.raises(MetricError, match="nearest must be above 0"):
        DepthMetric(nearest, farthest)
