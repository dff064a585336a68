"""ROI-align as an operator of PyTorch: derivatives, registration, compiled graphs."""

import pytest
import torch

from kernels.roi_align import roi_align


def test_gradcheck():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(2, 2, 4, generator=generator, dtype=torch.float64)
    boxes[..., 2:] += 0.3

    assert torch.autograd.gradcheck(
        lambda t: roi_align(t, boxes, grid=(3, 4), output_size=(2, 3)), tokens
    )


def test_gradcheck_of_normalised_rois_of_a_canvas():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 21, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    boxes[..., 2:] += 0.3
    settings = {"grid": (3, 2), "border": 1, "num_prefix_tokens": 1, "output_size": (2, 2)}

    assert torch.autograd.gradcheck(
        lambda t: roi_align(t, boxes, num_boxes=[1, 2], normalize=True, **settings), tokens
    )


# opcheck looks at the gradients of its own copies of inputs, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_strided", [False, True])
def test_the_operators_are_registered_soundly(normalize, dtype, is_strided):
    generator = torch.Generator().manual_seed(13)
    tokens = torch.randn(2, 21, 3, generator=generator)
    tokens = tokens.mT.contiguous().mT if is_strided else tokens
    window, output_size = [3, 2, 1, 1], [2, 2]
    boxes = torch.rand(3, 4, generator=generator)
    gradient = torch.randn(3, 4, 3, generator=generator).to(dtype)
    units_and_norms = (torch.rand(3, 4, 3), torch.rand(3, 4)) if normalize else (None, None)
    operators = torch.ops.refinery

    torch.library.opcheck(
        operators.roi_align.default,
        (tokens.requires_grad_(), boxes, [1, 2], window, output_size, normalize, dtype),
    )
    torch.library.opcheck(
        operators.roi_align_backward.default,
        (gradient, *units_and_norms, boxes, [1, 2], window, output_size, torch.float32),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_compiled_graph_is_whole_and_gives_the_same(normalize, dynamic):
    generator = torch.Generator().manual_seed(14)
    tokens = torch.randn(2, 21, 3, generator=generator, requires_grad=True)
    boxes = torch.rand(2, 3, 4, generator=generator)
    boxes[..., 2:] += 0.3
    upstream = torch.randn(6, 4, 3, generator=generator)

    def loss(tokens, boxes):
        settings = {"grid": (3, 2), "border": 1, "num_prefix_tokens": 1, "output_size": (2, 2)}
        return (roi_align(tokens * 2, boxes, normalize=normalize, **settings) * upstream).sum()

    eager = loss(tokens, boxes)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)(
        tokens, boxes
    )

    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, tokens), torch.autograd.grad(eager, tokens)
    )
