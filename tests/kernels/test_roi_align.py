"""ROI-align against the values of the authors' code and against torchvision."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from kernels import _roi_align_reference
from kernels.roi_align import roi_align, roi_align_reference

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


@pytest.mark.parametrize("name", BOXES)
def test_border_and_prefix_are_no_part_of_the_image(name):
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randn(2, 3 + 11 * 9, 6, generator=generator, dtype=torch.float64)
    tokens.requires_grad_()
    boxes = torch.tensor([[BOXES[name], BOXES["inside"]]] * 2, dtype=torch.float64)
    upstream = torch.randn(4, 12, 6, generator=generator).double()
    image = tokens[:, 3:].unflatten(1, (11, 9))[:, 2:9, 2:7].flatten(1, 2)

    ours = roi_align(tokens, boxes, grid=(7, 5), output_size=(3, 4), border=2, num_prefix_tokens=3)
    theirs = by_torchvision(image, boxes, (7, 5), (3, 4))

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (our_gradient,) = torch.autograd.grad((ours * upstream).sum(), tokens)
    (their_gradient,) = torch.autograd.grad((theirs * upstream).sum(), tokens)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-12)


def test_images_may_have_different_numbers_of_boxes():
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randn(3, 35, 4, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([BOXES["inside"], BOXES["huge"], BOXES["sticking out"]])
    settings = {"grid": (7, 5), "output_size": (2, 3)}

    ragged = roi_align(tokens, boxes, num_boxes=[2, 0, 1], **settings)

    first = roi_align(tokens[:1], boxes[None, :2], **settings)
    last = roi_align(tokens[2:], boxes[None, 2:], **settings)
    alone = torch.cat([first, last])
    torch.testing.assert_close(ragged, alone)
    upstream = torch.randn(3, 6, 4, generator=generator).double()
    (our_gradient,) = torch.autograd.grad((ragged * upstream).sum(), tokens)
    (alone_gradient,) = torch.autograd.grad((alone * upstream).sum(), tokens)
    torch.testing.assert_close(our_gradient, alone_gradient)
    assert not our_gradient[1].any()


def test_normalised_rois_are_those_of_normalize():
    generator = torch.Generator().manual_seed(10)
    tokens = torch.randn(2, 35, 6, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[BOXES["outside"], BOXES["sticking out"]]] * 2)
    upstream = torch.randn(4, 6, 6, generator=generator).double()
    settings = {"grid": (7, 5), "output_size": (2, 3)}

    ours = roi_align(tokens, boxes, normalize=True, **settings)
    theirs = torch.nn.functional.normalize(roi_align(tokens, boxes, **settings), dim=-1)

    torch.testing.assert_close(ours, theirs)
    assert not ours[0].any()
    assert ours[1].any()
    (our_gradient,) = torch.autograd.grad((ours * upstream).sum(), tokens)
    (their_gradient,) = torch.autograd.grad((theirs * upstream).sum(), tokens)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_reference_differentiated_by_pytorch_gives_the_same_gradient(normalize):
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randn(2, 1 + 45, 6, generator=generator).bfloat16().requires_grad_()
    boxes = torch.tensor([[BOXES["inside"], BOXES["huge"]]] * 2)
    settings = {
        "grid": (7, 3),
        "border": 1,
        "num_prefix_tokens": 1,
        "output_size": (3, 2),
        "normalize": normalize,
    }
    upstream = torch.randn(4, 6, 6, generator=generator)

    ours = roi_align(tokens, boxes, **settings)
    theirs = roi_align_reference(tokens, boxes, **settings)

    torch.testing.assert_close(ours, theirs)
    (our_gradient,) = torch.autograd.grad((ours * upstream).sum(), tokens)
    (their_gradient,) = torch.autograd.grad((theirs * upstream).sum(), tokens)
    assert our_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(our_gradient, their_gradient)


def test_a_narrow_result_is_rounded_once_and_its_gradient_not_at_all():
    generator = torch.Generator().manual_seed(12)
    tokens = torch.randn(1, 35, 6, generator=generator).requires_grad_()
    boxes = torch.tensor([[BOXES["inside"]]])
    settings = {"grid": (7, 5), "output_size": (3, 2), "normalize": True}
    upstream = torch.randn(1, 6, 6, generator=generator).bfloat16()

    wide = roi_align(tokens, boxes, **settings)
    narrow = roi_align(tokens, boxes, dtype=torch.bfloat16, **settings)

    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)
    (wide_gradient,) = torch.autograd.grad((wide * upstream.float()).sum(), tokens)
    (narrow_gradient,) = torch.autograd.grad(narrow, tokens, upstream)
    torch.testing.assert_close(narrow_gradient, wide_gradient)


def test_sixteen_bit_boxes_are_widened_and_get_no_gradient():
    tokens = torch.randn(1, 35, 6, requires_grad=True)
    boxes = torch.tensor([[BOXES["inside"]]]).bfloat16().requires_grad_()
    settings = {"grid": (7, 5), "output_size": (3, 2)}

    rois = roi_align(tokens, boxes, **settings)
    rois.sum().backward()

    torch.testing.assert_close(rois, roi_align(tokens, boxes.float(), **settings))
    assert boxes.grad is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_box_that_is_not_finite_gives_zeros(value):
    boxes = torch.tensor([[[0.2, 0.2, 0.7, value], BOXES["inside"]]])

    rois = roi_align(torch.ones(1, 35, 2), boxes, grid=(7, 5), output_size=(3, 2))

    assert not rois[0].any()
    torch.testing.assert_close(rois[1], torch.ones(6, 2))


def test_a_vast_box_costs_no_memory():
    # Its samples, were all of them tried, would fill terabytes.
    boxes = torch.tensor([[[-1e9, 0.2, 1e9, 0.7]]])

    rois = roi_align(torch.ones(1, 35, 2), boxes, grid=(7, 5), output_size=(1, 1))

    assert rois.max() < 1e-6


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


@pytest.mark.parametrize(
    ("num_boxes", "message"),
    [
        ([3], r"num_boxes is \[3\], wanted 2 numbers"),
        ([4, -1], "num_boxes"),
        ([1, 1], r"boxes are \(3, 4\), wanted \[2, 4\]"),
    ],
)
def test_numbers_of_boxes_that_do_not_add_up_are_refused(num_boxes, message):
    with pytest.raises(ValueError, match=message):
        roi_align(
            torch.zeros(2, 16, 3),
            torch.zeros(3, 4),
            num_boxes=num_boxes,
            grid=(4, 4),
            output_size=(2, 2),
        )


def test_boxes_in_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="normalised coordinates"):
        roi_align(
            torch.zeros(1, 16, 3), torch.zeros(1, 1, 4).int(), grid=(4, 4), output_size=(2, 2)
        )


def test_a_result_without_bins_is_refused():
    with pytest.raises(ValueError, match="one bin at least"):
        roi_align(torch.zeros(1, 16, 3), torch.zeros(1, 1, 4), grid=(4, 4), output_size=(0, 2))


def test_tokens_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"wanted \[images, tokens, channels\]"):
        roi_align(torch.zeros(16, 3), torch.zeros(1, 1, 4), grid=(4, 4), output_size=(2, 2))


def test_many_boxes_on_a_long_axis_take_no_more_memory(monkeypatch):
    sizes, real = [], _roi_align_reference.axis_weights

    def watched(*arguments, **settings):
        weights = real(*arguments, **settings)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(_roi_align_reference, "axis_weights", watched)
    tokens = torch.randn(1, 2700, 2, generator=torch.Generator().manual_seed(8))
    boxes = torch.tensor([[[-1.0, -1.0, 2.0, 2.0]]]).expand(1, 500, 4)

    roi_align(tokens, boxes, grid=(1, 2700), output_size=(3, 3))

    assert len(sizes) > 2
    assert max(sizes) <= _roi_align_reference._WEIGHTS_AT_ONCE
