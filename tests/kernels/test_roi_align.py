"""ROI-align against the values of the authors' code and against torchvision."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from kernels import roi_align

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

BOXES = {
    "inside": [0.21, 0.13, 0.68, 0.9],
    "whole": [0.0, 0.0, 1.0, 1.0],
    "sticking out": [-0.4, -0.2, 0.6, 1.7],
    "outside": [1.4, 1.3, 1.9, 2.0],
    "far outside": [-3.0, -3.0, -2.0, -2.0],
    "huge": [-2.0, -1.0, 3.0, 2.0],
    "empty": [0.5, 0.5, 0.5, 0.5],
    "a line": [0.2, 0.3, 0.8, 0.3],
    "turned": [0.8, 0.7, 0.2, 0.1],
    "half a cell": [0.31, 0.42, 0.35, 0.46],
}


def by_torchvision(tokens_BNC, boxes_BK4, grid, output_size):
    (height, width), batch = grid, len(tokens_BNC)
    maps_BChw = tokens_BNC.mT.reshape(batch, -1, height, width)
    scale = torch.tensor([width, height, width, height], dtype=boxes_BK4.dtype)
    rois = torchvision.ops.roi_align(
        maps_BChw, list((boxes_BK4 * scale).unbind(0)), output_size, aligned=True
    )
    return rois.flatten(2).mT


def test_values_and_gradient_equal_the_authors():
    golden = load_file(GOLDEN / "roi_align.safetensors")
    tokens = golden["tokens"].requires_grad_()

    rois = roi_align(tokens, golden["boxes"], grid=(8, 8), output_size=(8, 8))
    small = roi_align(tokens, golden["boxes"], grid=(8, 8), output_size=(4, 4))
    (gradient,) = torch.autograd.grad((rois * golden["upstream_weight"]).sum(), tokens)

    torch.testing.assert_close(rois, golden["rois"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small, golden["rois_4x4"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, golden["grad_tokens"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_size", [(1, 1), (3, 2), (7, 9), (11, 5)])
@pytest.mark.parametrize("name", BOXES)
def test_every_kind_of_box_is_treated_as_torchvision_does(name, output_size):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 35, 6, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[BOXES[name], BOXES["inside"]]] * 2, dtype=torch.float64)
    upstream = torch.randn(4, output_size[0] * output_size[1], 6, generator=generator).double()

    ours = roi_align(tokens, boxes, grid=(7, 5), output_size=output_size)
    theirs = by_torchvision(tokens, boxes, (7, 5), output_size)

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (our_gradient,) = torch.autograd.grad((ours * upstream).sum(), tokens)
    (their_gradient,) = torch.autograd.grad((theirs * upstream).sum(), tokens)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-12)


def test_random_boxes_in_float32_agree_with_torchvision():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(3, 13 * 11, 8, generator=generator)
    boxes = torch.rand(3, 20, 4, generator=generator) * 1.6 - 0.3
    boxes[..., 2:] = boxes[..., :2] + boxes[..., 2:].abs()

    ours = roi_align(tokens, boxes, grid=(13, 11), output_size=(6, 6))

    # Rounding moves a sample by 1e-6 of a cell, and neighbouring tokens differ by a few units.
    theirs = by_torchvision(tokens, boxes, (13, 11), (6, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("box", [[0.8, 0.1, 0.2, 0.7], [0.1, 0.8, 0.7, 0.2]])
def test_a_box_turned_along_one_axis_gives_zeros(box):
    # torchvision on the CPU asks for a vector of negative length here.
    tokens = torch.ones(1, 16, 2)

    rois = roi_align(tokens, torch.tensor([[box]]), grid=(4, 4), output_size=(2, 2))

    assert not rois.any()


def test_gradcheck():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(2, 2, 4, generator=generator, dtype=torch.float64)
    boxes[..., 2:] += 0.3

    assert torch.autograd.gradcheck(
        lambda t: roi_align(t, boxes, grid=(3, 4), output_size=(2, 3)), tokens
    )


def test_whole_image_box_at_the_same_grid_changes_nothing():
    tokens = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(6))

    rois = roi_align(tokens, torch.tensor([[BOXES["whole"]]]), grid=(5, 6), output_size=(5, 6))

    torch.testing.assert_close(rois, tokens, rtol=0, atol=1e-5)


def test_boxes_come_out_image_major():
    tokens = torch.arange(3.0)[:, None, None].expand(3, 16, 2)
    boxes = torch.tensor([BOXES["inside"]] * 2).expand(3, 2, 4)

    rois = roi_align(tokens, boxes, grid=(4, 4), output_size=(2, 2))

    assert rois[:, 0, 0].tolist() == pytest.approx([0, 0, 1, 1, 2, 2])


def test_sixteen_bit_tokens_are_resampled_in_float32_under_autocast():
    tokens = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    boxes = torch.tensor([[BOXES["inside"]]])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        rois = roi_align(tokens, boxes, grid=(8, 8), output_size=(8, 8))

    assert rois.dtype == torch.float32
    exact = roi_align(tokens.double(), boxes.double(), grid=(8, 8), output_size=(8, 8))
    torch.testing.assert_close(rois.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_boxes_give_no_rois():
    rois = roi_align(torch.randn(2, 16, 3), torch.zeros(2, 0, 4), grid=(4, 4), output_size=(2, 2))

    assert rois.shape == (0, 4, 3)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="15 tokens do not fill a grid of 4x4"):
        roi_align(torch.zeros(1, 15, 3), torch.zeros(1, 1, 4), grid=(4, 4), output_size=(2, 2))


def test_boxes_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"wanted \[1, boxes, 4\]"):
        roi_align(torch.zeros(1, 16, 3), torch.zeros(2, 1, 4), grid=(4, 4), output_size=(2, 2))
