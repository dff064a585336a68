"""Device code of attention.

Dimension key: B = samples, H = heads, T = tokens, Q = queries (kept tokens), D = channels of a
head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.heads import (
    LN_2,
    LOG2_E,
    head_offset,
    is_aligned,
    load_channels,
    row_offset,
    split_width,
)
from kernels.tiles import tiles
from kernels.window import TokenWindow

MAX_HEAD_DIM = 128


@triton.jit
def _store_rows(
    head_ptr,
    offset,
    is_row,
    values,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    channel = FIRST + tl.arange(0, WIDTH)
    mask = is_row[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    pointers = head_ptr + offset[:, None] + channel[None, :]
    tl.store(pointers, values.to(head_ptr.dtype.element_ty), mask)


# Not specialised: an image of a new size must not wait for a compile.
@triton.jit(do_not_specialize=["num_tokens", "num_queries", "prefix", "border", "grid_width"])
def _attention_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    out_ptr,  # [B, Q, H, D], packed
    lse_ptr,  # [B, H, Q], packed; None: not wanted
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ob,
    stride_oq,
    stride_oh,
    num_heads,
    num_tokens,
    num_queries,
    prefix,
    border,
    grid_width,
    exponent_scale,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    WIDTH_1: tl.constexpr,  # the head's channels in two tiles, of which the second may be empty
    WIDTH_2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program has BLOCK_Q queries of one head and goes over all keys."""
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    head = (program // num_blocks) % num_heads
    batch = program // num_blocks // num_heads
    query = (program % num_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < num_queries

    cell = query - prefix
    canvas_row = cell // grid_width + border
    token = prefix + canvas_row * (grid_width + 2 * border) + border + cell % grid_width
    token = tl.where(query < prefix, query, token)

    q_ptr += head_offset(batch, head, stride_qb, stride_qh, ALIGNED)
    k_ptr += head_offset(batch, head, stride_kb, stride_kh, ALIGNED)
    v_ptr += head_offset(batch, head, stride_vb, stride_vh, ALIGNED)
    q_offset = row_offset(token, stride_qt, ALIGNED)
    q_1 = load_channels(q_ptr, q_offset, is_query, stride_qd, HEAD_DIM, 0, WIDTH_1)
    out_1 = tl.zeros([BLOCK_Q, WIDTH_1], tl.float32)
    if WIDTH_2 > 0:
        q_2 = load_channels(q_ptr, q_offset, is_query, stride_qd, HEAD_DIM, WIDTH_1, WIDTH_2)
        out_2 = tl.zeros([BLOCK_Q, WIDTH_2], tl.float32)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    for start in range(0, num_tokens, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        is_key = key < num_tokens
        k_offset = row_offset(key, stride_kt, ALIGNED)
        v_offset = row_offset(key, stride_vt, ALIGNED)

        k_1 = load_channels(k_ptr, k_offset, is_key, stride_kd, HEAD_DIM, 0, WIDTH_1)
        score = tl.dot(q_1, tl.trans(k_1), input_precision="tf32x3")
        if WIDTH_2 > 0:
            k_2 = load_channels(k_ptr, k_offset, is_key, stride_kd, HEAD_DIM, WIDTH_1, WIDTH_2)
            score = tl.dot(q_2, tl.trans(k_2), score, input_precision="tf32x3")
        score = tl.where(is_key[None, :], score, float("-inf"))

        # Finite: every block has a key, so no row is all -inf.
        new_maximum = tl.maximum(maximum, tl.max(score, 1) * exponent_scale)
        weight = tl.exp2(score * exponent_scale - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weight, 1)
        maximum = new_maximum

        v_1 = load_channels(v_ptr, v_offset, is_key, stride_vd, HEAD_DIM, 0, WIDTH_1)
        weight = weight.to(v_1.dtype)
        out_1 = tl.dot(weight, v_1, out_1 * shrink[:, None], input_precision="tf32x3")
        if WIDTH_2 > 0:
            v_2 = load_channels(v_ptr, v_offset, is_key, stride_vd, HEAD_DIM, WIDTH_1, WIDTH_2)
            out_2 = tl.dot(weight, v_2, out_2 * shrink[:, None], input_precision="tf32x3")

    out_ptr += head_offset(batch, head, stride_ob, stride_oh, True)
    out_offset = row_offset(query, stride_oq, True)
    share = 1.0 / total[:, None]
    _store_rows(out_ptr, out_offset, is_query, out_1 * share, 0, WIDTH_1, HEAD_DIM)
    if WIDTH_2 > 0:
        _store_rows(out_ptr, out_offset, is_query, out_2 * share, WIDTH_1, WIDTH_2, HEAD_DIM)
    if lse_ptr is not None:
        lse_ptr += (batch.to(tl.int64) * num_heads + head) * num_queries
        lse = (maximum + tl.log2(total)) * LN_2
        tl.store(lse_ptr + query, lse, is_query)


def launch_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    window: TokenWindow,
    scale: float,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, Q, H, D]` and, if wanted, log-sum-exp `[B, H, Q]`, by the kernel."""
    B, H, T, D = q_BHTD.shape
    Q = window.prefix + window.num_image_tokens
    out_BQHD = q_BHTD.new_empty(B, Q, H, D)
    lse_BHQ = q_BHTD.new_empty(B, H, Q, dtype=torch.float32) if with_lse else None
    if out_BQHD.numel() == 0:
        return out_BQHD, lse_BHQ
    settings = tiles("attention", q_BHTD.device, head_dim=D, element_bytes=q_BHTD.element_size())
    width_1, width_2 = split_width(D)
    strides = [*q_BHTD.stride(), *k_BHTD.stride(), *v_BHTD.stride()]
    outer_strides = [stride for axis, stride in enumerate(strides) if axis % 4 != 3]
    # All on the first axis of the grid, the only one with room for more than 65535 programs.
    programs = triton.cdiv(Q, settings["BLOCK_Q"]) * H * B
    _attention_kernel[(programs,)](
        q_BHTD,
        k_BHTD,
        v_BHTD,
        out_BQHD,
        lse_BHQ,
        *strides,
        *out_BQHD.stride()[:3],
        H,
        T,
        Q,
        window.prefix,
        window.border,
        max(1, window.grid[1]),
        scale * LOG2_E.value,
        HEAD_DIM=D,
        WIDTH_1=width_1,
        WIDTH_2=width_2,
        ALIGNED=is_aligned(*outer_strides),
        **settings,
        enable_fp_fusion=True,
    )
    return out_BQHD, lse_BHQ
