"""The attention kernel against PyTorch in float64."""

import pytest
import torch

from kernels.attention import (
    attention,
    attention_reference,
    attention_with_lse,
    attention_with_lse_reference,
)
from kernels.window import TokenWindow
from tests.kernels.accuracy import assert_as_exact

# Error that is allowed where PyTorch happens to be exact: a rounding of numbers about 1.
FLOOR = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WINDOW = TokenWindow((5, 9), border=2, prefix=3)


def packed_heads(shape, dtype, device, seed=0):
    """q, k and v as views of one tensor [B, T, 3, H, D], as a projection gives them."""
    B, H, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, H, D, generator=generator).to(device, dtype)
    return qkv.permute(2, 0, 3, 1, 4)


def assert_right(q, k, v, window=None, scale=None, magnitude=1):
    """Compare both functions with PyTorch; float32 errors grow with the magnitude of the scores."""
    result = attention_with_lse(q, k, v, window=window, scale=scale)
    alone = attention(q, k, v, window=window, scale=scale)

    same_format = attention_with_lse_reference(q, k, v, window=window, scale=scale)
    exact = attention_with_lse_reference(
        q.double(), k.double(), v.double(), window=window, scale=scale
    )
    assert result.out_BQHD.dtype == alone.dtype == q.dtype
    assert result.out_BQHD.is_contiguous()
    assert result.lse_BHQ.dtype == torch.float32
    floor = FLOOR[q.dtype] * (magnitude if q.dtype == torch.float32 else 1)
    for out in (result.out_BQHD, alone):
        assert_as_exact(out, same_format.out_BQHD, exact.out_BQHD, floor=floor)
    # Scores are float32 whatever the inputs are.
    assert_as_exact(result.lse_BHQ, same_format.lse_BHQ, exact.lse_BHQ, floor=1e-5 * magnitude)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 80, 88, 96, 104, 128])
def test_every_head_dim_gives_the_values_of_pytorch(head_dim, dtype, device):
    q, k, v = packed_heads((1, 2, WINDOW.num_tokens, head_dim), dtype, device)

    assert_right(q, k, v, WINDOW)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200])
def test_any_number_of_tokens_gives_the_values_of_pytorch(num_tokens, dtype, device):
    q, k, v = packed_heads((1, 1, num_tokens, 72), dtype, device)

    assert_right(q, k, v)


@pytest.mark.parametrize(
    "window",
    [
        TokenWindow((1, 1), border=1),
        TokenWindow((14, 1), border=3, prefix=1),
        TokenWindow((1, 17), border=1, prefix=5),
        TokenWindow((9, 10), border=0, prefix=2),
    ],
    ids=str,
)
def test_any_window_gives_the_values_of_pytorch(window, dtype, device):
    q, k, v = packed_heads((1, 2, window.num_tokens, 64), dtype, device)

    assert_right(q, k, v, window)


def test_queries_are_those_of_the_window(dtype, device):
    q, k, v = packed_heads((1, 2, WINDOW.num_tokens, 72), dtype, device)

    of_all, of_window = attention(q, k, v), attention(q, k, v, window=WINDOW)

    kept = of_all[:, WINDOW.kept_index(of_all.device)]
    torch.testing.assert_close(of_window, kept, rtol=0, atol=0)


def test_scale_is_that_of_the_caller(dtype, device):
    q, k, v = packed_heads((1, 2, 70, 64), dtype, device)

    assert_right(q, k, v, scale=0.5)


def test_large_scores_do_not_overflow(dtype, device):
    q, k, v = packed_heads((1, 1, 70, 64), dtype, device)

    assert_right(q * 30, k, v, magnitude=30)


def test_any_strides_give_the_values_of_pytorch(dtype, device):
    q, k, _ = packed_heads((2, 2, 50, 72), dtype, device)
    generator = torch.Generator().manual_seed(1)
    wider = torch.randn(2, 2, 53, 75, generator=generator).to(device, dtype)
    v = wider[:, :, 3:, 3:]  # nothing of it is aligned
    channels_first = k.transpose(2, 3).contiguous().transpose(2, 3)

    assert_right(q, channels_first, v)
    assert_right(q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v)


def test_no_samples_give_no_outputs(dtype, device):
    q, k, v = packed_heads((0, 2, 10, 64), dtype, device)

    assert attention(q, k, v).shape == (0, 10, 2, 64)
    assert attention_with_lse(q, k, v).lse_BHQ.shape == (0, 2, 10)


def test_gradients_of_the_kernels_output_are_those_of_the_reference(device):
    leaves = packed_heads((1, 2, WINDOW.num_tokens, 64), torch.float32, device)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    result = attention_with_lse(*leaves, window=WINDOW)
    (result.out_BQHD.square().sum() + result.lse_BHQ.sin().sum()).backward()

    expected = attention_with_lse_reference(*leaves, window=WINDOW)
    loss = expected.out_BQHD.square().sum() + expected.lse_BHQ.sin().sum()
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[64, 72, 88, 128])
def served(request, cuda):
    """Queries, keys and values as served, and their window."""
    window = TokenWindow((32, 32), border=1, prefix=1)
    shape = (4, 16, window.num_tokens, request.param)
    return *packed_heads(shape, torch.bfloat16, cuda), window


def test_twenty_repeats_are_equal_bit_by_bit(served):
    q, k, v, window = served
    first = attention_with_lse(q, k, v, window=window)

    for _ in range(20):
        again = attention_with_lse(q, k, v, window=window)
        assert torch.equal(again.out_BQHD, first.out_BQHD)
        assert torch.equal(again.lse_BHQ, first.lse_BHQ)


def test_a_replayed_cuda_graph_equals_eager(served):
    q, k, v, window = served
    eager = attention(q, k, v, window=window)  # also compiles the kernel
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, window=window)
    captured.zero_()
    graph.replay()

    torch.testing.assert_close(captured, eager, rtol=0, atol=0)


def test_compiled_equals_eager_and_so_do_its_gradients(served):
    q, k, v, window = served
    leaves = [tensor[:1, :2].detach().requires_grad_() for tensor in (q, k, v)]

    def squares(q, k, v):
        return attention(q, k, v, window=window).float().square().sum()

    compiled = torch.compile(squares, fullgraph=True)(*leaves)
    grads = torch.autograd.grad(compiled, leaves)

    eager = squares(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=0)
    for grad, expected in zip(grads, torch.autograd.grad(eager, leaves), strict=True):
        atol = 2e-2 * expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=atol)


@pytest.mark.parametrize("mode", ["auto"], indirect=True)
@pytest.mark.parametrize("head_dim", [64, 72, 88, 96, 128])
def test_what_the_table_chooses_has_the_values_of_pytorch(head_dim, cuda):
    q, k, v = packed_heads((2, 4, WINDOW.num_tokens, head_dim), torch.bfloat16, cuda)

    chosen = attention(q, k, v, window=WINDOW)

    same_format = attention_reference(q, k, v, window=WINDOW)
    exact = attention_reference(q.double(), k.double(), v.double(), window=WINDOW)
    assert_as_exact(chosen, same_format, exact, floor=FLOOR[torch.bfloat16])
