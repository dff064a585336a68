import logging
from dataclasses import replace

import pytest
import torch

from tests.trainer.evaluate.probe_data import noise_grids
from trainer.evaluate.depth_probe import (
    DepthSettings,
    bin_depths,
    depth_probe,
    expected_depth,
    silog,
)
from trainer.evaluate.metrics import DepthMetric, MetricError
from trainer.evaluate.points import ProbeError

NEAREST, FARTHEST = 0.5, 8.0
FAST = DepthSettings(
    learning_rates=(1e-1, 3e-1), num_steps=60, batch_size=8, points_per_image=32, num_bins=32
)


def slopes(count, *, seed):
    """Depth maps of 32x48 px, smooth from a random near side to a random far side."""
    generator = torch.Generator().manual_seed(seed)
    ends = 1 + 5 * torch.rand(count, 2, generator=generator)
    share = torch.linspace(0, 1, 48)[None, None].expand(count, 32, 48)
    return list(ends[:, 0, None, None] * (1 - share) + ends[:, 1, None, None] * share)


def telling(depths):
    """Grids of 4x6 tokens, one channel the depth, its square another, and one dead."""
    coarse = [
        torch.nn.functional.interpolate(depth[None, None], size=(4, 6), mode="area")[0, 0]
        for depth in depths
    ]
    return [torch.stack([grid, grid.square(), torch.zeros(4, 6)], dim=-1) for grid in coarse]


def probe(train_grids, train_depths, val_grids, val_depths, settings=FAST, **options):
    return depth_probe(
        train_grids,
        train_depths,
        val_grids,
        val_depths,
        min_depth=NEAREST,
        max_depth=FARTHEST,
        settings=settings,
        **options,
    )


@pytest.mark.parametrize("bins", ["uniform", "log"])
def test_features_that_hold_the_depth_are_probed_almost_perfectly(bins):
    train, val = slopes(24, seed=0), slopes(8, seed=1)
    settings = replace(FAST, bins=bins, num_steps=150)

    result = probe(telling(train), train, telling(val), val, settings)

    # Depths spread over five metres.
    assert result.scores.rmse < 0.25
    assert result.scores.delta_1 > 0.99


def test_noise_is_probed_as_a_constant_would_be():
    train, val = slopes(96, seed=0), slopes(8, seed=1)
    constant = DepthMetric(NEAREST, FARTHEST)
    for depth in val:
        constant.update(torch.full_like(depth, float(torch.stack(train).mean())), depth)

    settings = replace(FAST, learning_rates=(1e-2, 3e-2), batch_size=16)
    result = probe(noise_grids(96, seed=2), train, noise_grids(8, seed=3), val, settings)

    # No worse than a sixth: the loss is of logarithms, and a few noisy channels are fitted.
    assert result.scores.rmse == pytest.approx(constant.compute().rmse, rel=0.17)


def test_a_probe_repeats_with_its_seed():
    depths = slopes(4, seed=0)
    grids = noise_grids(4, seed=1)

    def once(seed):
        return probe(grids, depths, grids, depths, replace(FAST, num_steps=4, seed=seed))

    assert once(0) == once(0)
    assert once(0) != once(1)


def test_unmeasured_pixels_neither_teach_nor_count():
    train, val = slopes(12, seed=0), slopes(4, seed=1)
    generator = torch.Generator().manual_seed(2)
    sparse = [torch.where(torch.rand(32, 48, generator=generator) < 0.1, d, 0.0) for d in train]
    # What is beyond the range is as if it were not measured.
    for depth in sparse:
        depth[0] = 1000.0

    result = probe(telling(train), sparse, telling(val), val, replace(FAST, num_steps=120))

    assert result.scores.rmse < 0.4


def test_only_the_masked_part_of_val_is_scored():
    train, val = slopes(4, seed=0), slopes(2, seed=1)
    asked = []

    def mask(height, width):
        asked.append((height, width))
        return torch.zeros(height, width, dtype=torch.bool)

    with pytest.raises(ProbeError, match="no depth of the val part is measured"):
        probe(telling(train), train, telling(val), val, eval_mask=mask)
    assert asked == [(32, 48)] * 2


def test_grids_and_maps_may_have_any_size_and_each_image_its_own():
    train = slopes(4, seed=0)
    val = [depth[: 30 - index, : 47 - index] for index, depth in enumerate(slopes(2, seed=1))]
    grids = noise_grids(2, seed=0) + noise_grids(2, seed=0, size=(3, 7))

    result = probe(grids, train, noise_grids(2, seed=3, size=(2, 5)), val)

    assert result.scores.rmse > 0


def test_bins_are_even_in_metres_or_in_their_logarithm():
    torch.testing.assert_close(bin_depths(1, 9, 3, "uniform"), torch.tensor([1.0, 5.0, 9.0]))
    torch.testing.assert_close(bin_depths(1, 9, 3, "log"), torch.tensor([1.0, 3.0, 9.0]))


def test_the_depth_is_the_mean_of_bins_by_weights_that_are_never_zero():
    bins = torch.tensor([1.0, 3.0])

    depths = expected_depth(torch.tensor([[[0.9, -5.0]], [[0.0, 0.0]]]), bins)

    # (0.9 + 0.1) of the first and 0.1 of the second; then 0.1 of both.
    torch.testing.assert_close(depths, torch.tensor([[1.3 / 1.1], [2.0]]))


def test_silog_forgives_most_of_a_wrong_scale_and_nothing_of_a_wrong_shape():
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0])
    scaled = 1.1 * truth
    predicted = torch.stack([truth, scaled, truth.flip(0)], dim=1)

    exact, scale, shape = silog(predicted, truth).tolist()

    assert exact == pytest.approx(0, abs=1e-2)
    # 10 sqrt((1 - 0.85) log(1.1)^2)
    assert scale == pytest.approx(10 * 0.15**0.5 * 0.0953102, rel=1e-3)
    assert shape > 10 * scale


def test_the_log_has_metres_by_learning_rate(caplog):
    depths = slopes(4, seed=0)

    with caplog.at_level(logging.INFO):
        result = probe(telling(depths), depths, telling(depths), depths)

    shown = [f"{rate:g} {rmse:.3f} m" for rate, rmse in result.rmse_by_learning_rate.items()]
    assert f"RMSE by learning rate: {', '.join(shown)}" in caplog.messages


def test_the_best_rate_at_the_edge_of_the_grid_is_said(caplog):
    depths = slopes(4, seed=0)
    grids = telling(depths)

    with caplog.at_level(logging.WARNING):
        result = probe(grids, depths, grids, depths, replace(FAST, learning_rates=(1e-7, 1e-1)))

    assert result.is_at_edge
    assert "depth probe: the best learning rate, 0.1, is at the edge" in caplog.text


@pytest.mark.parametrize(
    ("grids", "depths", "message"),
    [
        ([], [], "no images"),
        (noise_grids(2, seed=0), slopes(1, seed=0), "2 feature grids but 1 labels"),
        ([torch.full((4, 6, 12), torch.inf)], slopes(1, seed=0), "not finite"),
        (noise_grids(1, seed=0), [torch.zeros(1, 32, 48)], r"must be \[H, W\] in metres"),
        (noise_grids(1, seed=0), [torch.ones(32, 48, dtype=torch.int32)], "of a float dtype"),
        (noise_grids(1, seed=0), [torch.zeros(32, 48)], "no depth of the train part is measured"),
        (noise_grids(1, seed=0), [torch.full((32, 48), 1500.0)], "are the maps in metres"),
    ],
)
def test_what_cannot_be_probed_is_named(grids, depths, message):
    with pytest.raises(ProbeError, match=message):
        probe(grids, depths, noise_grids(1, seed=1), slopes(1, seed=1))


def test_an_empty_range_is_refused():
    depths = slopes(1, seed=0)
    grids = noise_grids(1, seed=0)

    with pytest.raises(MetricError, match="nearest must be above 0"):
        depth_probe(grids, depths, grids, depths, min_depth=0, max_depth=1, settings=FAST)
