import io

import numpy as np
import pytest
import torch
from PIL import Image

from service.errors import FeatureOverflowError
from service.pictures import pca_picture, principal_components
from tests.service.feature_maps import noise

MORE_VECTORS, MORE_CHANNELS, SQUARE = (40, 8), (8, 40), (12, 12)
# One matrix product in float32 beside float64: a few units in the last place of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def numpy_pca(vectors, num_components):
    """Scores and basis by the singular values of the centred vectors."""
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    _, _, basis = np.linalg.svd(centred, full_matrices=False)
    basis = basis[:num_components]
    return centred @ basis.T, basis


def pixels_of(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.format, np.asarray(picture)


@pytest.mark.parametrize("shape", [MORE_VECTORS, MORE_CHANNELS, SQUARE, (2, 3), (3, 2)])
def test_components_are_those_of_numpy_up_to_their_sign(shape):
    vectors = noise(*shape) + 3.0
    num_components = min(3, shape[0] - 1, shape[1])

    found = principal_components(vectors, num_components)

    scores, basis = numpy_pca(vectors, num_components)
    signs = np.sign((found.basis_kC.numpy() * basis).sum(axis=1))
    np.testing.assert_allclose(found.basis_kC.numpy(), basis * signs[:, None], **CLOSE)
    np.testing.assert_allclose(found.scores_Vk.numpy(), scores * signs, **CLOSE)
    np.testing.assert_allclose(found.mean_C.numpy(), vectors.numpy().mean(axis=0), **CLOSE)


@pytest.mark.parametrize("shape", [MORE_VECTORS, MORE_CHANNELS])
def test_the_first_component_varies_most(shape):
    scores_Vk = principal_components(noise(*shape), 5).scores_Vk

    spread = scores_Vk.var(dim=0)
    assert spread.tolist() == sorted(spread.tolist(), reverse=True)


@pytest.mark.parametrize("shape", [MORE_VECTORS, MORE_CHANNELS])
def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_vectors(shape):
    vectors = noise(*shape)

    basis_kC = principal_components(vectors, 3).basis_kC
    reversed_kC = principal_components(vectors.flip(0), 3).basis_kC

    torch.testing.assert_close(reversed_kC, basis_kC)
    largest = basis_kC.gather(1, basis_kC.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("shape", [MORE_VECTORS, MORE_CHANNELS, SQUARE, (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_equal_vectors_have_scores_of_zero_and_nothing_is_divided_by_it(shape, value):
    vectors = torch.full(shape, value)

    found = principal_components(vectors, min(shape))

    assert bool(torch.isfinite(found.basis_kC).all())
    torch.testing.assert_close(
        found.scores_Vk, torch.zeros(shape[0], min(shape)), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(found.scores_Vk @ found.basis_kC + found.mean_C, vectors)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("num_channels", [8, 200])
def test_repeated_vectors_give_no_direction_twice(scale, num_channels):
    # Ten different vectors of 40 span nine directions: the rest is rounding, and blown up to unit
    # length it would point where others do.
    vectors = (noise(10, num_channels) * scale)[torch.arange(40) % 10]
    num_components = min(40, num_channels)

    found = principal_components(vectors, num_components)

    gram = found.basis_kC.double() @ found.basis_kC.double().T
    torch.testing.assert_close(gram, torch.eye(num_components).double(), atol=1e-6, rtol=0)
    restored = found.scores_Vk @ found.basis_kC + found.mean_C
    torch.testing.assert_close(restored, vectors, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("grid", "size"),
    [((14, 14), (448, 448)), ((2, 3), (300, 450)), ((1, 1), (448, 448)), ((500, 2), (500, 2))],
)
def test_a_picture_has_a_square_for_each_patch_and_is_large_enough_to_see(grid, size):
    png = pca_picture(noise(grid[0] * grid[1], 6), grid)

    format, pixels = pixels_of(png)
    assert format == "PNG"
    assert pixels.shape == (*size, 3)
    side = size[0] // grid[0]
    squares = pixels.reshape(grid[0], side, grid[1], side, 3)
    assert bool((squares == squares[:, :1, :, :1]).all())


def test_a_picture_shows_the_components_as_red_green_and_blue():
    grid = (8, 8)
    vectors = noise(64, 16)
    scores_Vk = principal_components(vectors, 3).scores_Vk

    _, pixels = pixels_of(pca_picture(vectors, grid))

    colours = pixels[::56, ::56].reshape(64, 3)
    for channel in range(3):
        scores, values = scores_Vk[:, channel].numpy(), colours[:, channel].astype(int)
        assert bool((np.diff(values[np.argsort(scores)]) >= 0).all())
        assert (values.min(), values.max()) == (0, 255)


def test_one_odd_patch_does_not_darken_the_others():
    vectors = noise(400, 4)
    vectors[7] = 1e6

    _, pixels = pixels_of(pca_picture(vectors, (20, 20)))

    assert len(np.unique(pixels[..., 0])) > 100


def test_a_picture_of_fewer_than_three_components_leaves_the_other_colours_black():
    _, pixels = pixels_of(pca_picture(noise(16, 2), (4, 4)))

    assert pixels[..., 1].max() == 255
    assert pixels[..., 2].max() == 0


@pytest.mark.parametrize("grid", [(1, 1), (3, 3)])
def test_a_picture_of_equal_patches_is_of_one_colour(grid):
    _, pixels = pixels_of(pca_picture(torch.ones(grid[0] * grid[1], 5), grid))

    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1


def test_a_picture_is_drawn_of_features_in_the_models_precision():
    vectors = noise(16, 6, dtype=torch.bfloat16)

    assert pca_picture(vectors, (4, 4)) == pca_picture(vectors.float(), (4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_picture_is_drawn_of_features_that_are_not_finite(value):
    vectors = noise(16, 6)
    vectors[3, 2] = value

    with pytest.raises(FeatureOverflowError, match="image 0 are not finite"):
        pca_picture(vectors, (4, 4))
