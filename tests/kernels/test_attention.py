"""Attention for serving: reference, dispatch, autograd, compile."""

import pytest
import torch
from torch.nn import functional as F

from kernels import dispatch
from kernels.attention import (
    attention,
    attention_with_lse,
    attention_with_lse_reference,
)
from kernels.tiles import backend, tiles
from kernels.window import TokenWindow

WINDOW = TokenWindow((3, 4), border=2, prefix=1)
WINDOWS = [None, WINDOW, TokenWindow((7, 8), prefix=1), TokenWindow((3, 4), border=2)]


def packed_heads(num_tokens, head_dim=16, dtype=torch.float32, num_heads=2):
    generator = torch.Generator().manual_seed(num_tokens)
    qkv = torch.randn(2, num_tokens, 3, num_heads, head_dim, generator=generator).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4)


def length(window):
    return 57 if window is None else window.num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_output_is_that_of_sdpa_at_the_kept_tokens(window, dtype):
    q, k, v = packed_heads(length(window), dtype=dtype)

    out = attention(q, k, v, window=window, scale=0.3)

    of_all = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    expected = of_all if window is None else of_all[:, window.kept_index()]
    assert out.dtype == dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_every_head_dim_is_scaled_by_its_own_default(head_dim):
    q, k, v = packed_heads(20, head_dim)

    out = attention(q, k, v)

    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.parametrize("num_tokens", [1, 57, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lse_is_the_logsumexp_of_the_scaled_scores(dtype, num_tokens):
    q, k, v = packed_heads(num_tokens, dtype=dtype)

    out, lse = attention_with_lse(q, k, v)

    exact = (q.double() @ k.double().mT * 0.25).logsumexp(dim=-1)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=0)


def test_lse_of_a_window_is_that_of_its_queries():
    q, k, v = packed_heads(WINDOW.num_tokens)

    lse = attention_with_lse(q, k, v, window=WINDOW).lse_BHQ

    of_all = attention_with_lse(q, k, v).lse_BHQ
    torch.testing.assert_close(lse, of_all[:, :, WINDOW.kept_index()])


def test_autocast_changes_nothing():
    q, k, v = packed_heads(57)
    expected = attention_with_lse(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention_with_lse(q, k, v)

    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, TokenWindow((2, 1), border=1, prefix=1)], ids=str)
def test_gradients_of_output_and_lse_are_exact(window):
    leaves = packed_heads(13 if window is None else window.num_tokens, 3, torch.float64)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, window=window), leaves)
    assert torch.autograd.gradcheck(
        lambda *qkv: tuple(attention_with_lse(*qkv, window=window, scale=0.7)), leaves
    )


def test_gradients_are_those_of_the_reference_through_a_packed_projection():
    qkv = torch.randn(2, WINDOW.num_tokens, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_()

    def loss(operation):
        out, lse = operation(*qkv.permute(2, 0, 3, 1, 4), window=WINDOW)
        return out.square().sum() + lse.sin().sum()

    (grad,) = torch.autograd.grad(loss(attention_with_lse), qkv)
    (expected,) = torch.autograd.grad(loss(attention_with_lse_reference), qkv)

    torch.testing.assert_close(grad, expected)


def test_sixteen_bit_gradients_are_computed_in_float32():
    leaves = [leaf.detach().requires_grad_() for leaf in packed_heads(57, dtype=torch.bfloat16)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(attention(*leaves).float().sum(), leaves)

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(attention(*exact_leaves).sum(), exact_leaves)
    for grad, expected in zip(grads, exact, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), expected, rtol=2**-8, atol=1e-5)


def test_inference_computes_no_lse(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "logsumexp", None)

    attention(*packed_heads(57))


# opcheck looks at the gradients of its own copies of strided inputs, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_ops_keep_their_promises_to_pytorch(requires_grad, num_tokens):
    window = TokenWindow((3, 5), border=1, prefix=2) if num_tokens == 37 else TokenWindow((1, 1))
    packed = [*window.grid, window.border, window.prefix]
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in packed_heads(window.num_tokens))
    inputs = (q, k, v, packed, 0.25)
    ops = torch.ops.refinery
    grad_out, grad_lse = (t.detach() for t in ops.attention_with_lse(*inputs))
    tensors = tuple(t.detach() for t in (q, k, v))

    torch.library.opcheck(ops.attention.default, inputs)
    torch.library.opcheck(ops.attention_with_lse.default, inputs)
    for gradients in ((grad_out, None), (grad_out, grad_lse)):
        arguments = (*gradients, *tensors, packed, 0.25)
        torch.library.opcheck(ops.attention_backward.default, arguments)


@pytest.mark.parametrize("window", [None, WINDOW], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager_and_so_do_its_gradients(window, dynamic):
    leaves = [leaf.detach().requires_grad_() for leaf in packed_heads(length(window))]

    def loss(q, k, v):
        out, lse = attention_with_lse(q, k, v, window=window)
        return attention(q, k, v, window=window).sin().sum() + out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    grads = torch.autograd.grad(compiled(*leaves), leaves)

    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 56, 16)}, r"\(2, 2, 57, 16\), \(2, 2, 56, 16\)"),
        ({"v": torch.zeros(2, 2, 57, 8)}, r"one shape \[B, H, T, D\] is wanted"),
        ({"q": torch.zeros(57, 16)}, r"one shape \[B, H, T, D\] is wanted"),
        ({"v": torch.zeros(2, 2, 57, 16, dtype=torch.float16)}, "torch.float32, torch.float16"),
        ({"k": torch.zeros(2, 2, 57, 16, device="meta")}, "k on meta"),
        ({"scale": 0.0}, "scale is 0.0; a positive number is wanted"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"window": TokenWindow((3, 4), border=1)}, "57 tokens do not fill a grid of 3x4"),
    ],
)
@pytest.mark.parametrize("operation", [attention, attention_with_lse])
def test_what_does_not_fit_is_refused_in_words(operation, change, message):
    arguments = dict(zip("qkv", packed_heads(57), strict=True)) | change
    tensors = [arguments.pop(name) for name in "qkv"]

    with pytest.raises(ValueError, match=message):
        operation(*tensors, **arguments)


def test_no_tokens_and_integers_are_refused():
    with pytest.raises(ValueError, match="0 tokens of 16 channels"):
        attention(*packed_heads(0))
    with pytest.raises(ValueError, match="floating point numbers are wanted"):
        attention(*packed_heads(5).long())


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (12, torch.float32, "head dim 12 is not a multiple of 8"),
        (136, torch.float32, "head dim 136 is not a multiple of 8 up to 128"),
        (64, torch.float64, "no kernel computes in torch.float64"),
    ],
)
def test_an_explicit_kernel_that_cannot_run_is_an_error(head_dim, dtype, message, monkeypatch):
    monkeypatch.setattr(dispatch, "mode", lambda: "triton")
    monkeypatch.setattr(dispatch, "_obstacle", lambda _device, _asked: None)

    with pytest.raises(dispatch.KernelUnavailableError, match=message):
        attention(*packed_heads(5, head_dim, dtype))


@pytest.mark.parametrize("capability", [(9, 0), (8, 6)])
def test_tables_choose_the_kernel_where_sdpa_pads_and_for_every_lse(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    gpu = torch.device("cuda", 0)

    def chosen(operation, element_bytes):
        names = [
            backend(operation, gpu, head_dim=head_dim, element_bytes=element_bytes)
            for head_dim in range(8, 129, 8)
        ]
        return {8 * (i + 1) for i, name in enumerate(names) if name == "triton"}

    assert chosen("attention", 2) == {72, 80, 88}
    assert chosen("attention", 4) == set()
    assert chosen("attention_with_lse", 2) == set(range(8, 129, 8))
    assert chosen("attention_with_lse", 4) == set()
    for element_bytes in (2, 4):
        for head_dim in range(8, 129, 8):
            assert tiles("attention", gpu, head_dim=head_dim, element_bytes=element_bytes)
