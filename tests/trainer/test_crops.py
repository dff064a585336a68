"""Boxes, crop views and composites."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import roi_align as torchvision_roi_align

from trainer.crops import compose, crop_tokens, crop_views, sample_boxes, strip_width

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SIDES = ["left", "above", "right", "below"]
CROPS = {"area": (0.25, 0.5), "aspect": (2 / 3, 3 / 2)}


def sides_of(boxes):
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def test_crop_views_equal_the_authors():
    golden = load_file(GOLDEN / "roi_align.safetensors")

    views = crop_views(golden["image"], golden["boxes"], output_size=(32, 32))

    torch.testing.assert_close(views, golden["image_rois_32"], rtol=1e-5, atol=1e-5)


def test_crop_tokens_equal_the_authors():
    golden = load_file(GOLDEN / "roi_align.safetensors")

    rois = crop_tokens(golden["tokens"], golden["boxes"], (8, 8))

    torch.testing.assert_close(rois, golden["rois"], rtol=1e-5, atol=1e-5)


def test_crop_views_are_torchvision_roi_align_at_the_size_of_the_image():
    pixels = torch.randn(2, 3, 24, 36, generator=torch.Generator().manual_seed(0))
    boxes = sample_boxes(2, 3, **CROPS, generator=torch.Generator().manual_seed(1))

    views = crop_views(pixels, boxes)

    in_pixels = list((boxes * torch.tensor([36.0, 24.0, 36.0, 24.0])).unbind(0))
    theirs = torchvision_roi_align(pixels, in_pixels, (24, 36), aligned=True)
    torch.testing.assert_close(views, theirs, rtol=1e-5, atol=2e-5)


def test_crop_views_of_sixteen_bit_pixels_are_float32_under_autocast():
    boxes = torch.tensor([[[0.1, 0.1, 0.8, 0.8]]])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = crop_views(torch.randn(1, 3, 16, 16).bfloat16(), boxes)

    assert views.dtype == torch.float32


@pytest.mark.parametrize("side", SIDES)
def test_composites_equal_the_authors(side):
    golden = load_file(GOLDEN / "composite.safetensors")
    layout = SIDES.index(side)

    composite = compose(golden["crops"], golden["reference"], side=side, share=0.35, patch_size=16)

    assert torch.equal(composite.pixels, golden[f"canvas_layout{layout}"])
    for is_crop in golden[f"crop_mask_layout{layout}"]:
        assert torch.equal(composite.is_crop, is_crop)


@pytest.mark.parametrize("side", SIDES)
def test_the_mask_of_a_composite_finds_the_pixels_of_the_crop(side):
    crops, reference = torch.ones(2, 3, 40, 64), torch.zeros(1, 3, 40, 64)

    composite = compose(crops, reference, side=side, share=0.35, patch_size=8)

    patches = composite.pixels.unfold(2, 8, 8).unfold(3, 8, 8).amin(dim=(1, 4, 5)).flatten(1)
    assert torch.equal(patches.bool(), composite.is_crop.expand(2, -1))
    assert composite.is_crop.sum() == 5 * 8


def test_a_reference_of_another_size_is_refused():
    with pytest.raises(ValueError, match="reference image is 32x64 px, the crops 64x64 px"):
        compose(
            torch.ones(1, 3, 64, 64),
            torch.ones(1, 3, 32, 64),
            side="left",
            share=0.35,
            patch_size=16,
        )


@pytest.mark.parametrize(
    ("side", "tokens"), [(2, 2), (4, 2), (6, 2), (14, 4), (32, 12), (35, 12), (37, 12)]
)
def test_a_strip_is_a_third_of_the_side_in_even_tokens(side, tokens):
    assert strip_width(side, 0.35) == tokens


def test_boxes_have_the_area_and_shape_asked_for_and_lie_inside():
    boxes = sample_boxes(200, 3, **CROPS, generator=torch.Generator().manual_seed(0))

    width, height = sides_of(boxes)
    area, aspect = width * height, width / height
    assert boxes.shape == (200, 3, 4)
    assert boxes.dtype == torch.float32
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert area.min() >= 0.25 - 1e-5
    assert area.max() <= 0.5 + 1e-5
    assert aspect.min() >= 2 / 3 - 1e-4
    assert aspect.max() <= 3 / 2 + 1e-4


def test_boxes_use_the_whole_range_of_area_and_shape():
    boxes = sample_boxes(2000, 3, **CROPS, generator=torch.Generator().manual_seed(0))

    width, height = sides_of(boxes)
    # Standard errors with 6000 draws: 0.001 for the area, 0.003 for the log-aspect.
    assert (width * height).mean() == pytest.approx(0.375, abs=0.005)
    assert (width / height).log().mean() == pytest.approx(0.0, abs=0.015)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert centres.mean() == pytest.approx(0.5, abs=0.01)


def test_boxes_as_large_as_the_image_stay_inside():
    boxes = sample_boxes(
        50, 2, area=(0.9, 1.0), aspect=(0.5, 2.0), generator=torch.Generator().manual_seed(0)
    )

    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_the_same_generator_state_gives_the_same_boxes():
    first, second = (
        sample_boxes(2, 3, **CROPS, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )

    assert torch.equal(first, second)
