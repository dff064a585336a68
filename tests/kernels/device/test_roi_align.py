"""The ROI-align kernels against PyTorch in float64."""

import numpy as np
import pytest
import torch

from kernels import _roi_align_launch
from kernels.roi_align import roi_align, roi_align_reference
from tests.kernels.accuracy import assert_as_exact
from tests.kernels.test_roi_align import BOXES

# Error that is allowed where PyTorch happens to be exact: a rounding of numbers about 1.
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_tokens(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def random_boxes(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(*shape, 4, generator=generator)
    boxes[..., 2:] = boxes[..., :2] * 0.9 + boxes[..., 2:]
    return boxes


def assert_right(tokens, boxes, *, upstream=None, dtype=torch.float32, **settings):
    """Compare values and gradient with the reference, differentiated by PyTorch."""

    def values_and_gradient(function, tokens, dtype):
        tokens = tokens.detach().requires_grad_()
        rois = function(tokens, boxes, dtype=dtype, **settings)
        gradient = random_tokens(rois.shape, torch.float32, tokens.device, seed=1)
        gradient = gradient if upstream is None else upstream
        rois.backward(gradient.to(out_dtype).to(rois.dtype))
        return rois.detach(), tokens.grad

    out_dtype = dtype
    ours, our_gradient = values_and_gradient(roi_align, tokens, dtype)
    same, same_gradient = values_and_gradient(roi_align_reference, tokens, dtype)
    exact, exact_gradient = values_and_gradient(roi_align_reference, tokens.double(), torch.float64)
    assert ours.dtype == dtype
    assert our_gradient.dtype == tokens.dtype
    for result, same_format, truth in (
        (ours, same, exact),
        (our_gradient, same_gradient, exact_gradient),
    ):
        magnitude = max(1.0, truth.abs().max().item())
        assert_as_exact(result, same_format, truth, floor=FLOOR[result.dtype] * magnitude)


def test_every_kind_of_box_gives_the_values_and_gradient_of_pytorch(dtype, device):
    boxes = torch.tensor(list(BOXES.values()))
    tokens = random_tokens((3, 2 + 9 * 7, 72), dtype, device)

    assert_right(
        tokens,
        boxes,
        grid=(7, 5),
        border=1,
        num_prefix_tokens=2,
        output_size=(2, 2),
        num_boxes=[4, 0, 6],
    )


@pytest.mark.parametrize("channels", [40, 1152, 4096])
def test_normalised_rois_of_any_width_give_the_values_and_gradient_of_pytorch(
    channels, dtype, device
):
    tokens = random_tokens((2, 3 * 4, channels), dtype, device)

    assert_right(
        tokens,
        random_boxes((2, 1)),
        grid=(3, 4),
        output_size=(1, 5),
        normalize=True,
        dtype=dtype,
    )


def test_more_bins_than_a_program_of_a_large_result_takes_are_all_written(
    dtype, device, monkeypatch
):
    large = {"NUM_BINS": 4, "UNROLL": 2, "num_warps": 1}
    tiles = _roi_align_launch.tiles
    monkeypatch.setattr(
        _roi_align_launch,
        "tiles",
        lambda kernel, *args, **facts: (
            large if kernel == "roi_align_forward" else tiles(kernel, *args, **facts)
        ),
    )
    tokens = random_tokens((1, 9, 64), dtype, device)

    assert_right(tokens, random_boxes((1, 1)), grid=(3, 3), output_size=(2, 5))


@pytest.mark.parametrize("channels", [24, 33])
def test_tokens_of_any_strides_give_the_values_and_gradient_of_pytorch(channels, dtype, device):
    channels_first = random_tokens((2, channels, 3 * 3 + 4), dtype, device)
    tokens = channels_first[:, :, 2:-2].mT
    upstream = torch.ones(1, 1, 1, device=device).expand(2, 4, channels)

    assert_right(tokens, random_boxes((2, 1)), grid=(3, 3), output_size=(2, 2), upstream=upstream)


def test_unequal_axes_longer_than_a_block_give_the_values_of_pytorch(dtype, device):
    tokens = random_tokens((1, 70 * 2, 16), dtype, device)

    rois = roi_align(tokens, random_boxes((1, 1)), grid=(70, 2), output_size=(9, 1))

    settings = {"grid": (70, 2), "output_size": (9, 1)}
    exact = roi_align_reference(tokens.double(), random_boxes((1, 1)), **settings)
    same = roi_align_reference(tokens, random_boxes((1, 1)), **settings)
    # A sample of a long axis lies at a larger number, which float32 rounds more.
    assert_as_exact(rois, same, exact, floor=1e-5)


def test_boxes_that_are_vast_or_not_finite_do_no_harm(device):
    tokens = torch.ones(1, 9, 16, device=device)
    vast = [-1e9, 0.2, 1e9, 0.7]
    boxes = torch.tensor([[vast, [torch.nan, 0.1, 0.5, 0.5], [0.1, 0.1, torch.inf, 0.5]]])

    with np.errstate(all="ignore"):  # of the interpreter
        rois = roi_align(tokens, boxes, grid=(3, 3), output_size=(1, 1))

    assert rois[0].max() < 1e-6
    assert not rois[1:].any()


def test_an_image_without_boxes_gets_a_gradient_of_zero(device):
    tokens = torch.ones(2, 9, 16, device=device, requires_grad=True)

    roi_align(tokens, torch.zeros(2, 0, 4), grid=(3, 3), output_size=(2, 2)).sum().backward()

    assert not tokens.grad.any()


def launch_twice_as_in_training(tokens, boxes):
    tokens = tokens.detach().requires_grad_()
    rois = roi_align(tokens, boxes, grid=(37, 37), border=1, output_size=(37, 37), normalize=True)
    rois.backward(torch.sin(torch.arange(rois.numel(), device=rois.device)).view_as(rois))
    return rois.detach(), tokens.grad


def test_twenty_repeats_give_the_same_bits(cuda):
    tokens = random_tokens((4, 39 * 39, 1152), torch.bfloat16, cuda)
    boxes = random_boxes((4, 8)).to(cuda)

    first = launch_twice_as_in_training(tokens, boxes)

    for _ in range(20):
        repeat = launch_twice_as_in_training(tokens, boxes)
        assert all(torch.equal(a, b) for a, b in zip(first, repeat, strict=True))


def test_large_shapes_give_the_values_and_gradient_of_pytorch(cuda, dtype):
    tokens = random_tokens((4, 5 + 39 * 39, 1152), dtype, cuda)
    settings = {"grid": (37, 37), "border": 1, "num_prefix_tokens": 5, "output_size": (37, 37)}

    assert_right(tokens, random_boxes((4, 8)), **settings)


def test_a_cuda_graph_replays_with_other_tokens_and_boxes(cuda):
    tokens = random_tokens((2, 1 + 16 * 16, 768), torch.bfloat16, cuda)
    boxes = random_boxes((2, 5)).to(cuda)
    settings = {
        "grid": (14, 14),
        "border": 1,
        "num_prefix_tokens": 1,
        "output_size": (7, 7),
        "normalize": True,
        "dtype": torch.float16,
    }
    roi_align(tokens, boxes, **settings)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roi_align(tokens, boxes, **settings)

    tokens.copy_(random_tokens(tokens.shape, tokens.dtype, cuda, seed=1))
    boxes.copy_(random_boxes((2, 5), seed=1))
    graph.replay()

    torch.testing.assert_close(captured, roi_align(tokens, boxes, **settings), rtol=0, atol=0)


@pytest.mark.parametrize("are_boxes_on_the_cpu", [True, False])
def test_a_compiled_graph_gives_the_same(cuda, are_boxes_on_the_cpu):
    tokens = random_tokens((2, 196, 768), torch.bfloat16, cuda).requires_grad_()
    boxes = random_boxes((2, 5)).to("cpu" if are_boxes_on_the_cpu else cuda)

    def loss(tokens, boxes):
        rois = roi_align(tokens * 2, boxes, grid=(14, 14), output_size=(14, 14), normalize=True)
        return (rois * rois[..., :1]).mean()

    eager = loss(tokens, boxes)
    compiled = torch.compile(loss, fullgraph=True)(tokens, boxes)

    torch.testing.assert_close(compiled, eager)
    (expected,) = torch.autograd.grad(eager, tokens)
    (gradient,) = torch.autograd.grad(compiled, tokens)
    atol = 2e-2 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=atol)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("normalize", [False, True])
def test_fake_and_real_results_agree(cuda, normalize):
    tokens = random_tokens((2, 21, 48), torch.float16, cuda).requires_grad_()

    torch.library.opcheck(
        torch.ops.refinery.roi_align.default,
        (tokens, random_boxes((3,)), [1, 2], [3, 2, 1, 1], [2, 2], normalize, torch.float32),
    )
