"""Attention inflow by scaled dot-product attention, on the GPU: see `kernels.attention_inflow`.

The scores are walked twice, for each query over the keys (what its attention adds up to), then for
each key over the queries. Every number is written by one program: results repeat to the bit.

Dimension key: B = samples, H = heads, T = all tokens, N = tokens that take part, D = channels of a
head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._flow_tokens_device import head_constants, token_rows
from kernels.heads import LN_2, LOG2_E, head_offset, load_channels
from kernels.tiles import tiles


@triton.jit
def _row_lse_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    index_ptr,  # [N] int64, or None: all tokens
    penalty_ptr,  # [B, N] -inf where a key is rejected, else 0; or None
    lse_ptr,  # [B, H, N]
    num_tokens,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    scale,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Natural log-sum-exp of each query's scores; +inf where all keys are rejected."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_base = q_ptr + head_offset(batch, head, stride_qb, stride_qh, ALIGNED)
    k_base = k_ptr + head_offset(batch, head, stride_kb, stride_kh, ALIGNED)
    queries, is_query, q_starts = token_rows(
        tl.program_id(0) * BLOCK_QUERIES, num_tokens, index_ptr, stride_qt, BLOCK_QUERIES, ALIGNED
    )
    q_1 = load_channels(q_base, q_starts, is_query, stride_qd, D, 0, D_1)
    if D_2 > 0:
        q_2 = load_channels(q_base, q_starts, is_query, stride_qd, D, D_1, D_2)
    scale_log2 = scale * LOG2_E

    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    for first in range(0, num_tokens, BLOCK_KEYS):
        keys, is_key, k_starts = token_rows(
            first, num_tokens, index_ptr, stride_kt, BLOCK_KEYS, ALIGNED
        )
        k_1 = load_channels(k_base, k_starts, is_key, stride_kd, D, 0, D_1)
        scores = tl.dot(q_1, tl.trans(k_1), input_precision="tf32x3")
        if D_2 > 0:
            k_2 = load_channels(k_base, k_starts, is_key, stride_kd, D, D_1, D_2)
            scores = tl.dot(q_2, tl.trans(k_2), scores, input_precision="tf32x3")
        if penalty_ptr is None:
            penalty = tl.where(is_key, 0.0, float("-inf"))
        else:
            penalty = tl.load(
                penalty_ptr + batch * num_tokens + keys, mask=is_key, other=float("-inf")
            )
        scores = scores * scale_log2 + penalty[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # Until a query has met a key that counts, -inf must not be subtracted from -inf.
        origin = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - origin) + tl.sum(tl.exp2(scores - origin[:, None]), 1)
        highest = new_highest
    has_key = total > 0
    lse = (highest + tl.log2(tl.where(has_key, total, 1.0))) * LN_2
    lse = tl.where(has_key, lse, float("inf"))
    lse_row = lse_ptr + (batch * tl.num_programs(1) + head) * num_tokens
    tl.store(lse_row + queries, lse, mask=is_query)


@triton.jit
def _column_sums_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    index_ptr,  # [N] int64, or None: all tokens
    penalty_ptr,  # [B, N] -inf where a key is rejected, else 0; or None
    lse_ptr,  # [B, H, N]
    sums_ptr,  # [B, H, N]
    num_tokens,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_lb,
    stride_lh,
    stride_ln,
    scale,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """Attention that each key gets from all queries.

    Keys are the rows of the product: a thread then adds up its own numbers, and threads meet once
    after the loop instead of once a block.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_base = q_ptr + head_offset(batch, head, stride_qb, stride_qh, ALIGNED)
    k_base = k_ptr + head_offset(batch, head, stride_kb, stride_kh, ALIGNED)
    lse_row = lse_ptr + batch * stride_lb + head * stride_lh
    keys, is_key, k_starts = token_rows(
        tl.program_id(0) * BLOCK_KEYS, num_tokens, index_ptr, stride_kt, BLOCK_KEYS, ALIGNED
    )
    k_1 = load_channels(k_base, k_starts, is_key, stride_kd, D, 0, D_1)
    if D_2 > 0:
        k_2 = load_channels(k_base, k_starts, is_key, stride_kd, D, D_1, D_2)
    scale_log2 = scale * LOG2_E

    sums = tl.zeros([BLOCK_KEYS], tl.float32)
    for first in range(0, num_tokens, BLOCK_QUERIES):
        queries, is_query, q_starts = token_rows(
            first, num_tokens, index_ptr, stride_qt, BLOCK_QUERIES, ALIGNED
        )
        q_1 = load_channels(q_base, q_starts, is_query, stride_qd, D, 0, D_1)
        scores = tl.dot(k_1, tl.trans(q_1), input_precision="tf32x3")
        if D_2 > 0:
            q_2 = load_channels(q_base, q_starts, is_query, stride_qd, D, D_1, D_2)
            scores = tl.dot(k_2, tl.trans(q_2), scores, input_precision="tf32x3")
        # A query that does not exist spreads nothing: exp2(-inf) = 0.
        lse = tl.load(lse_row + queries * stride_ln, mask=is_query, other=float("inf"))
        sums += tl.sum(tl.exp2(scores * scale_log2 - (lse * LOG2_E)[None, :]), 1)
    if penalty_ptr is not None:
        penalty = tl.load(penalty_ptr + batch * num_tokens + keys, mask=is_key, other=0.0)
        sums = tl.where(penalty == 0, sums, 0.0)
    tl.store(sums_ptr + (batch * tl.num_programs(1) + head) * num_tokens + keys, sums, mask=is_key)


def launch_paper_inflow(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    into_BN: Tensor,
    *,
    index_N: Tensor | None = None,
    rejected_BN: Tensor | None = None,
    lse_BHN: Tensor | None = None,
) -> None:
    """Add the `paper` inflow to `into_BN`."""
    num_samples, num_tokens = into_BN.shape
    num_heads, head_dim = q_BHTD.shape[1], q_BHTD.shape[3]
    penalty_BN = None
    if rejected_BN is not None:
        penalty_BN = q_BHTD.new_zeros(num_samples, num_tokens, dtype=torch.float32)
        penalty_BN.masked_fill_(rejected_BN, -torch.inf)
    shared = head_constants(q_BHTD, k_BHTD) | {"scale": head_dim**-0.5}
    facts = {"head_dim": head_dim, "element_bytes": q_BHTD.element_size()}

    if lse_BHN is None:
        lse_BHN = q_BHTD.new_empty(num_samples, num_heads, num_tokens, dtype=torch.float32)
        tile = tiles("attention_flow_row_lse", q_BHTD.device, **facts)
        grid = (triton.cdiv(num_tokens, tile["BLOCK_QUERIES"]), num_heads, num_samples)
        _row_lse_kernel[grid](
            q_BHTD,
            k_BHTD,
            index_N,
            penalty_BN,
            lse_BHN,
            num_tokens,
            *q_BHTD.stride(),
            *k_BHTD.stride(),
            **shared,
            **tile,
        )
    sums_BHN = q_BHTD.new_empty(num_samples, num_heads, num_tokens, dtype=torch.float32)
    tile = tiles("attention_flow_column_sums", q_BHTD.device, **facts)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_KEYS"]), num_heads, num_samples)
    _column_sums_kernel[grid](
        q_BHTD,
        k_BHTD,
        index_N,
        penalty_BN,
        lse_BHN,
        sums_BHN,
        num_tokens,
        *q_BHTD.stride(),
        *k_BHTD.stride(),
        *lse_BHN.stride(),
        **shared,
        **tile,
    )
    into_BN.add_(sums_BHN.sum(dim=1), alpha=1 / num_heads)
