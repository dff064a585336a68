import pytest
import torch
from safetensors.torch import load_file

from backbone.registers import (
    LearnableBorder,
    border_width,
    canvas_size,
    draw_border,
    register_mask,
    seeded_border,
    strip,
    surround,
)
from tests.support import GOLDEN


@pytest.mark.parametrize(
    ("grid", "r_reg", "ceil", "floor"),
    [((32, 32), 32, 1, 1), ((37, 37), 37, 1, 1), ((33, 40), 32, 2, 1), ((4, 4), 32, 1, 1)],
)
def test_border_width_follows_the_shorter_side(grid, r_reg, ceil, floor):
    assert border_width(grid, r_reg) == ceil
    assert border_width(grid, r_reg, "floor") == floor


@pytest.mark.parametrize("width", [1, 2])
def test_surround_and_mask_reproduce_the_reference(width):
    golden = load_file(GOLDEN / "registers.safetensors")
    images = golden["images"]
    grid = (images.shape[2] // 16, images.shape[3] // 16)
    border = torch.zeros(3, *canvas_size(tuple(images.shape[2:]), width, 16))

    canvas = surround(images, border, width=width, patch_size=16)

    assert torch.equal(canvas, golden[f"canvas_w{width}"])
    mask = register_mask(grid, width)
    assert all(torch.equal(mask, row) for row in golden[f"register_mask_w{width}"])


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("border", [1, 2])
def test_strip_inverts_surround(height, width, border):
    tokens = torch.arange((height + 2 * border) * (width + 2 * border)).float().view(1, -1, 1)

    image, registers = strip(tokens, (height, width), border)

    mask = register_mask((height, width), border)
    assert torch.equal(image, tokens[:, ~mask])
    assert torch.equal(registers, tokens[:, mask])


def test_strip_refuses_another_canvas():
    with pytest.raises(ValueError, match="20 tokens are not a canvas of 6x6"):
        strip(torch.zeros(1, 20, 4), (4, 4), 1)


def test_surround_refuses_a_border_of_another_canvas():
    with pytest.raises(ValueError, match="border is"):
        surround(torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32), width=1, patch_size=16)


def test_the_inference_border_depends_on_canvas_and_seed_alone():
    first = seeded_border("gaussian", (64, 48), seed=5)
    torch.manual_seed(99)

    assert torch.equal(first, seeded_border("gaussian", (64, 48), seed=5))
    assert not torch.equal(first, seeded_border("gaussian", (64, 48), seed=6))


def test_fills_have_the_distribution_they_are_named_for():
    def draw(fill):
        return draw_border(fill, (128, 128), generator=torch.Generator().manual_seed(0))

    gaussian, uniform, zeros = draw("gaussian"), draw("uniform"), draw("zeros")

    # 49,152 draws: the mean of each is within 5 standard errors, 5 / sqrt(49152) = 0.023
    assert abs(gaussian.mean()) < 0.023
    assert abs(gaussian.std() - 1) < 0.023
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    assert abs(uniform.mean() - 0.5) < 0.023
    assert not zeros.any()


def test_a_border_per_image_differs_between_images():
    border = draw_border("gaussian", (32, 32), generator=torch.Generator().manual_seed(0), batch=2)

    assert border.shape == (2, 3, 32, 32)
    assert not torch.equal(border[0], border[1])


def test_learnable_border_trains_its_rim_and_nothing_else():
    border = LearnableBorder((64, 64), width=1, patch_size=16)
    image = torch.randn(2, 3, 32, 32)

    surround(image, border((64, 64), 1), width=1, patch_size=16).sum().backward()

    trained = border.patches.grad.abs().sum(dim=(0, 3, 4)) > 0
    assert trained.flatten().equal(register_mask((2, 2), 1))


def test_learnable_border_lays_its_patches_out_in_place():
    border = LearnableBorder((48, 64), width=1, patch_size=16)
    with torch.no_grad():
        border.patches.copy_(torch.arange(12).view(1, 3, 4, 1, 1).expand_as(border.patches))

    pixels = border((48, 64), 1)

    assert pixels[0, ::16, ::16].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_learnable_border_fits_other_canvases(width):
    border = LearnableBorder((96, 96), width=2, patch_size=16)
    with torch.no_grad():
        border.patches.fill_(1.0)
        border.patches[:, 2:-2, 2:-2] = float("nan")
    canvas = canvas_size((80, 48), width, 16)

    pixels = border(canvas, width)

    rim = surround(torch.zeros(1, 3, 80, 48), pixels, width=width, patch_size=16)
    assert torch.isfinite(rim).all()
