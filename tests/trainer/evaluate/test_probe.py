import logging
from dataclasses import replace

import pytest
import torch

from tests.trainer.evaluate.probe_data import (
    NUM_CLASSES,
    noise_grids,
    striped_labels,
    telling_grids,
)
from trainer.evaluate.datasets import IGNORE
from trainer.evaluate.metrics import MetricError
from trainer.evaluate.points import ProbeError
from trainer.evaluate.probe import ProbeSettings, segmentation_probe

FAST = ProbeSettings(learning_rates=(1e-1, 3e-1), num_steps=30, batch_size=8, points_per_image=48)


def probe(train_grids, train_labels, val_grids, val_labels, settings=FAST, **options):
    return segmentation_probe(
        train_grids,
        train_labels,
        val_grids,
        val_labels,
        num_classes=NUM_CLASSES,
        settings=settings,
        **options,
    )


@pytest.mark.parametrize("normalization", ["batch", "whitening"])
def test_features_that_hold_the_labels_are_probed_perfectly(normalization):
    train, val = striped_labels(24, seed=0), striped_labels(8, seed=1)
    settings = replace(FAST, normalization=normalization)
    # A feature for each pixel: nothing is left to upsampling.
    fine_train = [torch.nn.functional.one_hot(label.long(), NUM_CLASSES).half() for label in train]
    fine_val = [torch.nn.functional.one_hot(label.long(), NUM_CLASSES).half() for label in val]

    result = probe(fine_train, train, fine_val, val, settings)

    assert result.scores.miou > 0.999
    assert min(iou for iou in result.scores.class_iou if iou is not None) > 0.999


def test_tokens_among_noise_are_read_but_for_the_rims_that_upsampling_rounds():
    train, val = striped_labels(24, seed=0), striped_labels(8, seed=1)

    result = probe(telling_grids(train, seed=2), train, telling_grids(val, seed=3), val)

    assert result.scores.pixel_accuracy > 0.9


def test_noise_is_probed_at_chance():
    train, val = striped_labels(24, seed=0), striped_labels(8, seed=1)

    result = probe(noise_grids(24, seed=2), train, noise_grids(8, seed=3), val)

    assert result.scores.pixel_accuracy == pytest.approx(1 / NUM_CLASSES, abs=0.1)


@pytest.mark.parametrize("normalization", ["batch", "whitening"])
def test_a_probe_is_not_held_up_by_correlated_constant_or_far_channels(normalization):
    train, val = striped_labels(24, seed=0), striped_labels(8, seed=1)
    # A third of a channel is its own, the rest is shared by twelve; the thirteenth is dead.
    mix = torch.eye(13, 12) / 3 + torch.ones(13, 12) * (torch.arange(13) < 12)[:, None]
    settings = replace(FAST, learning_rates=(3e-1, 1.0), num_steps=60, normalization=normalization)

    def mixed(labels, seed):
        return [1e-3 * (grid @ mix.T) + 0.5 for grid in telling_grids(labels, seed=seed)]

    result = probe(mixed(train, 2), train, mixed(val, 3), val, settings)

    assert result.scores.pixel_accuracy > 0.85


def test_a_probe_repeats_with_its_seed_and_differs_with_another():
    train, val = striped_labels(12, seed=0), striped_labels(4, seed=1)
    grids = noise_grids(12, seed=2), train, noise_grids(4, seed=3), val

    def once(seed):
        return probe(*grids, replace(FAST, num_steps=5, seed=seed))

    assert once(0) == once(0)
    assert once(0) != once(1)


def test_grids_and_labels_may_have_any_size_and_each_image_its_own():
    train, val = striped_labels(12, seed=0), striped_labels(4, seed=1)
    val = [label[: 30 - index, : 47 - index] for index, label in enumerate(val)]
    train_grids = noise_grids(6, seed=2) + noise_grids(6, seed=2, size=(5, 3))

    result = probe(train_grids, train, noise_grids(4, seed=3, size=(2, 7)), val)

    assert 0.0 <= result.scores.miou <= 1.0


def test_ignored_pixels_neither_teach_nor_count():
    train, val = striped_labels(24, seed=0), striped_labels(8, seed=1)
    grids = telling_grids(train, seed=2), telling_grids(val, seed=3)
    plain = probe(grids[0], train, grids[1], val)

    # The lower half of every label is ignored, and what the features say there is wrong.
    def halved(labels):
        return [torch.cat([label[:16], torch.full_like(label[16:], IGNORE)]) for label in labels]

    def misled(part):
        return [torch.cat([grid[:2], grid[2:].roll(1, dims=-1)]) for grid in part]

    result = probe(misled(grids[0]), halved(train), misled(grids[1]), halved(val))

    assert result.scores.pixel_accuracy == pytest.approx(plain.scores.pixel_accuracy, abs=0.05)


def test_an_image_of_nothing_but_ignored_pixels_is_left_out():
    train, val = striped_labels(4, seed=0), striped_labels(2, seed=1)
    train[1] = torch.full_like(train[1], IGNORE)
    grids = noise_grids(4, seed=2), noise_grids(2, seed=3)
    alone = probe(grids[0], train, grids[1][1:], val[1:])
    val[0] = torch.full_like(val[0], IGNORE)

    assert probe(grids[0], train, grids[1], val) == alone


def test_the_best_rate_at_the_edge_of_the_grid_is_said(caplog):
    train, val = striped_labels(12, seed=0), striped_labels(4, seed=1)
    settings = replace(FAST, learning_rates=(1e-7, 1e-6, 1e-1))

    with caplog.at_level(logging.WARNING):
        result = probe(
            telling_grids(train, seed=2), train, telling_grids(val, seed=3), val, settings
        )

    assert result.is_at_edge
    assert "the best learning rate, 0.1, is at the edge of the grid" in caplog.text


def test_the_log_has_percent_by_learning_rate(caplog):
    labels = striped_labels(4, seed=0)
    grids = telling_grids(labels, seed=2)

    with caplog.at_level(logging.INFO):
        result = probe(grids, labels, grids, labels)

    shown = [f"{rate:g} {100 * v:.1f} %" for rate, v in result.miou_by_learning_rate.items()]
    assert f"mIoU by learning rate: {', '.join(shown)}" in caplog.messages


def test_every_step_and_every_scored_image_is_told():
    told = []
    labels = striped_labels(3, seed=0)
    grids = noise_grids(3, seed=1)

    probe(grids, labels, grids, labels, replace(FAST, num_steps=7), advance=told.append)

    assert sum(told) == 7 + 3


@pytest.mark.parametrize(
    ("grids", "labels", "message"),
    [
        ([], [], "no images"),
        (noise_grids(2, seed=0), striped_labels(1, seed=0), "2 feature grids but 1 labels"),
        ([torch.zeros(24, 12)], striped_labels(1, seed=0), r"must be\s+\[h, w, C\]"),
        (
            [torch.zeros(4, 6, 12), torch.zeros(4, 6, 11)],
            striped_labels(2, seed=0),
            "with one C, here 12",
        ),
        ([torch.full((4, 6, 12), torch.nan)], striped_labels(1, seed=0), "grid 0 .* not finite"),
        (noise_grids(1, seed=0), [torch.zeros(1, 32, 48)], r"must be \[H, W\]"),
        (noise_grids(1, seed=0), [torch.full((32, 48), 9)], "holds class 9; classes are 0 to 3"),
        (noise_grids(1, seed=0), [torch.full((32, 48), IGNORE)], "every train label is 'ignore'"),
    ],
)
def test_what_cannot_be_probed_is_named(grids, labels, message):
    with pytest.raises(ProbeError, match=message):
        probe(grids, labels, noise_grids(1, seed=1), striped_labels(1, seed=1))


def test_parts_of_different_channels_are_refused():
    labels = striped_labels(1, seed=0)

    with pytest.raises(ProbeError, match="train features have 12 channels, val features 5"):
        probe(noise_grids(1, seed=0), labels, [torch.zeros(4, 6, 5)], labels)


def test_a_val_part_of_nothing_but_ignored_pixels_is_refused():
    labels = striped_labels(1, seed=0)
    grids = noise_grids(1, seed=0)

    with pytest.raises((ProbeError, MetricError), match="every val label is 'ignore'"):
        probe(grids, labels, grids, [torch.full((32, 48), IGNORE)])
