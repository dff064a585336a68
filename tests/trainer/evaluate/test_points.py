import pytest
import torch

from trainer.evaluate import points as points_module
from trainer.evaluate.points import Normalization, Points, draw_points, features_at, held


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 6), (32, 48)), ((5, 3), (37, 41)), ((1, 2), (9, 3)), ((7, 9), (3, 4))]
)
def test_features_at_points_are_those_of_bilinear_upsampling(grid, size):
    grid_hwC = torch.randn(*grid, 8, generator=torch.Generator().manual_seed(0))
    everywhere = torch.arange(size[0] * size[1], dtype=torch.int32)
    upsampled = torch.nn.functional.interpolate(
        grid_hwC.movedim(-1, 0)[None], size=size, mode="bilinear", align_corners=False
    )

    points = Points(everywhere, everywhere, size, 1.0)
    found_PC = features_at([grid_hwC], [points], torch.device("cpu"))

    torch.testing.assert_close(found_PC, upsampled[0].flatten(1).T, rtol=1e-4, atol=1e-5)


def test_points_of_several_images_come_in_order():
    grids = [torch.full((2, 2, 3), 1.0), torch.full((3, 1, 3), 2.0)]
    one = torch.zeros(1, dtype=torch.int32)
    points = [Points(one, one, (8, 8), 1.0), Points(one, one, (5, 5), 1.0)]

    found_PC = features_at(grids, points, torch.device("cpu"))

    assert found_PC[:, 0].tolist() == [1.0, 2.0]


def test_only_known_pixels_are_drawn_as_many_as_their_share():
    target = torch.arange(200).reshape(10, 20)
    generator = torch.Generator().manual_seed(0)

    weighed = draw_points(target, target < 50, generator, most=100, weigh=True)
    plain = draw_points(target, target < 50, generator, most=20)

    assert len(weighed.position_P) == 25
    assert weighed.share == 0.25
    assert len(plain.position_P) == 20
    assert bool((weighed.target_P < 50).all())
    assert torch.equal(weighed.target_P, weighed.position_P.long())


def test_batch_normalization_centres_and_scales_every_channel():
    generator = torch.Generator().manual_seed(0)
    grids = [1e3 + torch.randn(4, 5, 6, generator=generator) for _ in range(20)]
    flat = torch.cat([grid.flatten(0, 1) for grid in grids])

    normalized = Normalization.fit(grids, "batch")(flat)

    torch.testing.assert_close(normalized.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(normalized.std(dim=0), torch.ones(6), rtol=5e-3, atol=0)


def test_whitening_takes_correlations_away_and_keeps_dead_channels_dead():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    mix[:, 5] = 0
    grids = [torch.randn(4, 5, 6, generator=generator) @ mix for _ in range(40)]
    flat = torch.cat([grid.flatten(0, 1) for grid in grids])

    normalized = Normalization.fit(grids, "whitening")(flat)

    covariance = normalized.T @ normalized / len(flat)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert float(eigenvalues[0]) < 1e-3
    torch.testing.assert_close(eigenvalues[1:], torch.ones(5), rtol=1e-2, atol=0)


def test_the_scale_of_features_does_not_matter():
    grids = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))]
    small = [1e-2 * grid for grid in grids]

    normalized = Normalization.fit(small, "batch")(small[0])

    torch.testing.assert_close(
        normalized, Normalization.fit(grids, "batch")(grids[0]), rtol=1e-4, atol=1e-4
    )


def test_what_fits_is_held_in_memory_and_what_does_not_is_read_again(monkeypatch):
    grids = [torch.zeros(2, 2, 4)] * 3
    assert held(grids, "cpu") is not grids

    monkeypatch.setattr(points_module, "MAX_HELD_BYTES", 3 * 63)

    assert held(grids, "cpu") is grids
