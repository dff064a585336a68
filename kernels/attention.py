"""Attention for serving: outputs only of the tokens that are wanted, keys and values over all.

The last block of a served forward needs no output of the register border. SDPA runs wherever it is
as fast; the kernel runs where SDPA pads the head's channels (72, 80, 88) and where the log-sum-exp
is asked for, and the tables in `configs/` say which.

Dimension key: B = samples, H = heads, T = tokens, Q = kept tokens, D = channels of a head.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels._attention_device import MAX_HEAD_DIM, launch_attention
from kernels.dispatch import on_device_of, unsupported_dtype, unsupported_span, use_triton
from kernels.precision import check_alike, full_precision, widen
from kernels.tiles import backend
from kernels.window import TokenWindow

# What SDPA may use on a GPU, best first, whatever the defaults of the installed PyTorch are.
SDPA_BACKEND_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_IS_ENABLED = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
_QUERIES_AT_ONCE = 256  # of the reference's log-sum-exp, which holds [B, H, 256, T] scores


class AttentionOutput(NamedTuple):
    """What attention returns when its log-sum-exp is wanted too.

    Attributes:
        out_BQHD: Packed, in the dtype of the queries.
        lse_BHQ: Natural logarithm of the sum of `exp(scale * q . k)` over the keys, float32
            (float64 for float64 inputs).
    """

    out_BQHD: Tensor
    lse_BHQ: Tensor


@full_precision
def attention_reference(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    window: TokenWindow | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `attention` computes, by PyTorch's SDPA on the gathered queries; differentiable.

    Differs from the other references: 16-bit inputs are not widened, SDPA accumulates in float32.
    """
    q_BHQD = q_BHTD if window is None else _kept(q_BHTD, window)
    out_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHTD, v_BHTD, scale=scale)
    return out_BHQD.transpose(1, 2).contiguous()


@full_precision
def attention_with_lse_reference(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    window: TokenWindow | None = None,
    scale: float | None = None,
) -> AttentionOutput:
    """What `attention_with_lse` computes, in plain PyTorch; differentiable."""
    out_BQHD = attention_reference(q_BHTD, k_BHTD, v_BHTD, window=window, scale=scale)
    q_BHQD = q_BHTD if window is None else _kept(q_BHTD, window)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    keys_BHDT = widen(k_BHTD).mT
    chunks = [
        (widen(q_BHCD) * scale @ keys_BHDT).logsumexp(dim=-1)
        for q_BHCD in q_BHQD.split(_QUERIES_AT_ONCE, dim=2)
    ]
    return AttentionOutput(out_BQHD, torch.cat(chunks, dim=-1))


def _kept(tokens_BHTD: Tensor, window: TokenWindow) -> Tensor:
    """Prefix and image tokens, `[B, H, Q, D]`: slices, so nothing waits for the device."""
    if window.border == 0:
        return tokens_BHTD
    (h, w), border = window.grid, window.border
    canvas = tokens_BHTD[:, :, window.prefix :].unflatten(2, (h + 2 * border, w + 2 * border))
    image = canvas[:, :, border : border + h, border : border + w].flatten(2, 3)
    return torch.cat([tokens_BHTD[:, :, : window.prefix], image], dim=2) if window.prefix else image


def _takes_kernel(operation: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    head_dim = q.shape[-1]
    unsupported = unsupported_dtype(q.dtype) or unsupported_span(q, k, v)
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        unsupported = f"head dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    elif max(t.shape[2] * t.stride(2) for t in (q, k, v)) >= 2**31:
        unsupported = "a head's tokens span 2**31 elements or more"
    slower = None
    if unsupported is None and q.is_cuda:
        facts = {"head_dim": head_dim, "element_bytes": q.element_size()}
        if backend(operation, q.device, **facts) == "sdpa":
            slower = f"the table prefers PyTorch for head dim {head_dim} in {q.dtype}"
    return use_triton(operation, q, unsupported=unsupported, slower=slower)


def _forward(q: Tensor, k: Tensor, v: Tensor, window: Sequence[int], scale: float) -> Tensor:
    kept = _unpack(window)
    if _takes_kernel("attention", q, k, v):
        with on_device_of(q):
            return launch_attention(q, k, v, kept, scale, with_lse=False)[0]
    with sdpa_in_order(q.device):
        return attention_reference(q, k, v, window=kept, scale=scale)


_attention = torch.library.custom_op("refinery::attention", _forward, mutates_args=())


@torch.library.custom_op("refinery::attention_with_lse", mutates_args=())
def _attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, window: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    kept = _unpack(window)
    if _takes_kernel("attention_with_lse", q, k, v):
        with on_device_of(q):
            out, lse = launch_attention(q, k, v, kept, scale, with_lse=True)
        assert lse is not None
        return out, lse
    with sdpa_in_order(q.device):
        return attention_with_lse_reference(q, k, v, window=kept, scale=scale)


@torch.library.custom_op("refinery::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the formula, one head at a time; serving needs none, so this is not fused."""
    kept = _unpack(window)
    grad_q, grad_k, grad_v = (t.new_zeros(t.shape) for t in (q, k, v))
    index = kept.kept_index(q.device)
    with torch.autocast(q.device.type, enabled=False):
        for h in range(q.shape[1]):
            q_BQD = widen(_kept(q[:, h : h + 1], kept)[:, 0]) * scale
            k_BTD, v_BTD = widen(k[:, h]), widen(v[:, h])
            grad_BQD = widen(grad_out[:, :, h])
            weight_BQT = (q_BQD @ k_BTD.mT).softmax(dim=-1)
            grad_v[:, h] = weight_BQT.mT @ grad_BQD
            grad_weight_BQT = grad_BQD @ v_BTD.mT
            offset_BQ = (weight_BQT * grad_weight_BQT).sum(dim=-1)
            if grad_lse is not None:
                offset_BQ = offset_BQ - grad_lse[:, h]
            grad_score_BQT = weight_BQT * (grad_weight_BQT - offset_BQ[..., None])
            grad_k[:, h] = grad_score_BQT.mT @ q_BQD
            grad_q[:, h].index_copy_(1, index, (grad_score_BQT @ k_BTD * scale).to(q.dtype))
    return grad_q, grad_k, grad_v


def _unpack(window: Sequence[int]) -> TokenWindow:
    """The window from the numbers that an op can take: h, w, border, prefix."""
    h, w, border, prefix = window
    return TokenWindow((h, w), border, prefix)


class _SdpaOrder(threading.local):
    """Whether this thread is inside `sdpa_in_order`."""

    is_set = False


_sdpa_order = _SdpaOrder()


@contextlib.contextmanager
def sdpa_in_order(device: torch.device) -> Iterator[None]:
    """SDPA chooses by `SDPA_BACKEND_ORDER` inside, among the backends that are enabled.

    Every call of `attention` sees to it by itself; around all blocks of a model it costs once
    what it costs a call, about 30 microseconds.
    """
    if device.type != "cuda" or _sdpa_order.is_set:
        yield
        return
    enabled = [backend for backend in SDPA_BACKEND_ORDER if _IS_ENABLED[backend]()]
    _sdpa_order.is_set = True
    try:
        with sdpa_kernel(enabled, set_priority=True):
            yield
    finally:
        _sdpa_order.is_set = False


@_attention.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, window: Sequence[int], _scale: float) -> Tensor:
    B, H, _T, D = q.shape
    kept = _unpack(window)
    return q.new_empty(B, kept.prefix + kept.num_image_tokens, H, D)


@_attention_with_lse.register_fake
def _(
    q: Tensor, _k: Tensor, _v: Tensor, window: Sequence[int], _scale: float
) -> tuple[Tensor, Tensor]:
    B, H, _T, D = q.shape
    kept = _unpack(window)
    Q = kept.prefix + kept.num_image_tokens
    return q.new_empty(B, Q, H, D), widen(q.new_empty(0)).new_empty(B, H, Q)


@_attention_backward.register_fake
def _(
    _grad_out: Tensor,
    _grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _window: Sequence[int],
    _scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    q, k, v, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
    grads = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.window, ctx.scale)
    return *grads, None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)
_attention_with_lse.register_autograd(_backward, setup_context=_save_for_backward)


def attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    window: TokenWindow | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of the kept tokens over all tokens.

    On a CUDA device the kernel or SDPA runs, as the table of the device says for the head dim and
    number format; elsewhere SDPA does. Differentiable, but the backward pass is not fused.

    Args:
        q_BHTD, k_BHTD, v_BHTD: Of one shape and dtype, any strides: views of a packed
            `[B, T, 3, H, D]` are not copied. The kernel takes head dims that are multiples of 8 up
            to 128, in float32, float16 or bfloat16.
        window: Outputs only for its prefix tokens, then for its image in raster order. None: for
            all tokens.
        scale: Of the scores, positive. None: `D ** -0.5`.

    Returns:
        `out_BQHD`, packed, in the dtype of the queries; autocast changes nothing.

    Raises:
        ValueError: shapes, dtypes or devices differ, the window is of another length, or the scale
            is not positive.
        KernelUnavailableError: `REFINERY_KERNELS=triton` and the kernel cannot do it.
    """
    packed, scale = _checked(q_BHTD, k_BHTD, v_BHTD, window, scale)
    if _is_plain_inference(q_BHTD, k_BHTD, v_BHTD):
        return _forward(q_BHTD, k_BHTD, v_BHTD, packed, scale)
    return cast(Tensor, _attention(q_BHTD, k_BHTD, v_BHTD, packed, scale))


def _is_plain_inference(*tensors: Tensor) -> bool:
    """Whether nobody traces and no gradient is wanted.

    The op's way through PyTorch's dispatcher takes longer than the attention of a small image, in
    every block of a model.
    """
    if torch.compiler.is_compiling():
        return False
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wants_gradient and all(type(t) is Tensor for t in tensors)


def attention_with_lse(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    window: TokenWindow | None = None,
    scale: float | None = None,
) -> AttentionOutput:
    """`attention`, and the log-sum-exp of the scores of every query; both are differentiable.

    SDPA does not give the latter away, so on a CUDA device the kernel runs for every head dim and
    16-bit format that it takes. The reference multiplies queries and keys twice.

    Args, errors: as `attention`.
    """
    packed, scale = _checked(q_BHTD, k_BHTD, v_BHTD, window, scale)
    return AttentionOutput(*_attention_with_lse(q_BHTD, k_BHTD, v_BHTD, packed, scale))


def _checked(
    q: Tensor, k: Tensor, v: Tensor, window: TokenWindow | None, scale: float | None
) -> tuple[list[int], float]:
    """Window and scale as the ops take them. No window: every token is a prefix token."""
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v are {shapes}; one shape [B, H, T, D] is wanted")
    check_alike(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; one dtype is wanted")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; a positive number is wanted")
    T, D = q.shape[2:]
    if T == 0 or D == 0:
        raise ValueError(f"{T} tokens of {D} channels; one of each is wanted at least")
    if window is None:
        window = TokenWindow((0, 0), prefix=T)
    window.check(T)
    return [*window.grid, window.border, window.prefix], D**-0.5 if scale is None else scale
