import io

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.preview import ColorBasis, draw_preview, principal_colors
from trainer.reference_image import SHIPPED, draw_reference


def test_colours_follow_the_largest_differences():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(3).repeat_interleave(20)
    tokens = 5 * torch.eye(3, 16)[group] + 0.05 * torch.randn(60, 16, generator=generator)

    colors = principal_colors(tokens)

    assert colors.shape == (60, 3)
    assert 0 <= colors.min() <= colors.max() <= 1
    centres = torch.stack([colors[group == g].mean(dim=0) for g in range(3)])
    assert torch.cdist(centres, centres).add(torch.eye(3)).min() > 0.5
    assert max(colors[group == g, :2].std(dim=0).max() for g in range(3)) < 0.1


def test_colours_do_not_depend_on_the_sign_or_scale_of_tokens():
    tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(principal_colors(3 * tokens), principal_colors(tokens))


def test_equal_tokens_do_not_divide_by_zero():
    assert principal_colors(torch.ones(10, 8)).isfinite().all()


def test_a_basis_gives_the_colours_it_was_fitted_with_and_takes_other_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 16, generator=generator)

    basis = ColorBasis.fit(tokens)

    torch.testing.assert_close(basis.colors(tokens[:5]), basis.colors(tokens)[:5])
    others = basis.colors(10 * torch.randn(7, 16, generator=generator))
    assert others.shape == (7, 3)
    assert 0 <= others.min() <= others.max() <= 1


def test_few_tokens_of_many_channels_have_the_components_of_the_whole_product():
    tokens = torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    centred = unit - unit.mean(dim=0)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T

    found = ColorBasis.fit(tokens).basis_C3

    torch.testing.assert_close((found * expected).sum(dim=0).abs(), torch.ones(3))


def test_a_preview_shows_image_before_and_after_in_one_basis():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))

    sheet = Image.open(io.BytesIO(draw_preview(images, tokens, tokens, (2, 3))))

    assert sheet.size == (3 * 256, 22 + 2 * 256)
    columns = np.asarray(sheet)[22:].reshape(512, 3, 256, 3)
    # The same tokens have the same colours in both columns, as large as their patches.
    np.testing.assert_array_equal(columns[:, 1], columns[:, 2])
    assert len(np.unique(columns[:256, 1].reshape(-1, 3), axis=0)) == 6


@pytest.mark.slow
def test_the_shipped_reference_image_is_the_scripts():
    drawn = np.asarray(draw_reference(512), dtype=int)

    shipped = np.asarray(Image.open(SHIPPED).convert("RGB"), dtype=int)
    # Sines differ by a rounding step between machines.
    assert shipped.shape == (512, 512, 3)
    assert (np.abs(drawn - shipped) > 4).mean() < 0.01


def test_the_reference_image_is_small_and_varied():
    assert SHIPPED.stat().st_size < 200_000
    shipped = np.asarray(Image.open(SHIPPED), dtype=float)
    assert shipped.std() > 40
