"""Attention inflow by cosines of joined heads, on the GPU: see `kernels.attention_inflow`.

Both walks over the scores are one kernel. With queries as rows it adds up exp(cosine) over the
keys; with keys as rows it adds up exp(cosine) / (that sum) over the queries.

Dimension key: B = samples, H = heads, T = all tokens, N = tokens that take part, D = channels of a
head, C = channels of all heads, S = shares of a walk over the columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._flow_tokens_device import head_constants, token_rows
from kernels.heads import LOG2_E, head_offset, load_channels
from kernels.precision import SHORTEST_NORM
from kernels.tiles import tiles

_JOINED_WIDTHS = (64, 32, 16)  # channels of a step where the heads' channels lie side by side
SHORTEST: tl.constexpr = tl.constexpr(SHORTEST_NORM)
_MIN_PROGRAMS = 264  # two for each of the 132 multiprocessors of a Hopper GPU; estimate


@triton.jit
def _inverse_norms_kernel(
    tokens_ptr,  # [B, H, T, D]
    index_ptr,  # [N] int64, or None: all tokens
    inverse_ptr,  # [B, N]
    num_tokens,
    num_heads,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """1 / norm of each token over the channels of all heads."""
    batch = tl.program_id(1).to(tl.int64)
    rows, exists, starts = token_rows(
        tl.program_id(0) * BLOCK_ROWS, num_tokens, index_ptr, stride_t, BLOCK_ROWS, ALIGNED
    )
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for head in range(num_heads):
        base = tokens_ptr + head_offset(batch, tl.cast(head, tl.int64), stride_b, stride_h, ALIGNED)
        part = load_channels(base, starts, exists, stride_d, D, 0, D_1).to(tl.float32)
        squares += tl.sum(part * part, 1)
        if D_2 > 0:
            part = load_channels(base, starts, exists, stride_d, D, D_1, D_2).to(tl.float32)
            squares += tl.sum(part * part, 1)
    inverse = 1.0 / tl.maximum(tl.sqrt(squares), SHORTEST)
    tl.store(inverse_ptr + batch * num_tokens + rows, inverse, mask=exists)


@triton.jit
def _exp_sums_kernel(
    a_ptr,  # [B, H, T, D], whose tokens are the rows
    b_ptr,  # [B, H, T, D], whose tokens are the columns
    index_ptr,  # [N] int64, or None: all tokens
    a_inverse_ptr,  # [B, N] 1 / norm of each row, 0 where rejected
    b_inverse_ptr,  # [B, N] of each column
    weight_ptr,  # [B, N] factor of each column's exponential, or None: 1
    sums_ptr,  # [B, S, N]
    num_tokens,
    num_heads,
    num_shares,
    stride_ab,
    stride_ah,
    stride_at,
    stride_ad,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_bd,
    D: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum over columns of weight * exp(cosine): cosines are at most 1, no maximum is needed."""
    share, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_of_batch = batch * num_tokens
    rows, is_row, a_starts = token_rows(
        tl.program_id(0) * BLOCK_ROWS, num_tokens, index_ptr, stride_at, BLOCK_ROWS, ALIGNED
    )
    a_inverse = tl.load(a_inverse_ptr + row_of_batch + rows, mask=is_row, other=0.0) * LOG2_E

    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(share * BLOCK_COLUMNS, num_tokens, num_shares * BLOCK_COLUMNS):
        columns, is_column, b_starts = token_rows(
            first, num_tokens, index_ptr, stride_bt, BLOCK_COLUMNS, ALIGNED
        )
        products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for head in range(num_heads):
            wide_head = tl.cast(head, tl.int64)
            a_base = a_ptr + head_offset(batch, wide_head, stride_ab, stride_ah, ALIGNED)
            b_base = b_ptr + head_offset(batch, wide_head, stride_bb, stride_bh, ALIGNED)
            a_1 = load_channels(a_base, a_starts, is_row, stride_ad, D, 0, D_1)
            b_1 = load_channels(b_base, b_starts, is_column, stride_bd, D, 0, D_1)
            products = tl.dot(a_1, tl.trans(b_1), products, input_precision="tf32x3")
            if D_2 > 0:
                a_2 = load_channels(a_base, a_starts, is_row, stride_ad, D, D_1, D_2)
                b_2 = load_channels(b_base, b_starts, is_column, stride_bd, D, D_1, D_2)
                products = tl.dot(a_2, tl.trans(b_2), products, input_precision="tf32x3")
        b_inverse = tl.load(b_inverse_ptr + row_of_batch + columns, mask=is_column, other=0.0)
        if weight_ptr is None:
            weight = tl.where(is_column, 1.0, 0.0)
        else:
            weight = tl.load(weight_ptr + row_of_batch + columns, mask=is_column, other=0.0)
        exponentials = tl.exp2(products * a_inverse[:, None] * b_inverse[None, :])
        sums += tl.sum(exponentials * weight[None, :], 1)
    sums_row = sums_ptr + (batch * tl.num_programs(1) + share) * num_tokens
    tl.store(sums_row + rows, sums, mask=is_row)


def launch_release_inflow(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    into_BN: Tensor,
    *,
    index_N: Tensor | None = None,
    rejected_BN: Tensor | None = None,
) -> None:
    """Add the `release` inflow to `into_BN`."""
    q_BHTD, k_BHTD = recut_heads(q_BHTD, k_BHTD)
    num_tokens = into_BN.shape[1]
    q_inverse_BN = _inverse_norms(q_BHTD, index_N, num_tokens)
    k_inverse_BN = _inverse_norms(k_BHTD, index_N, num_tokens)
    if rejected_BN is not None:
        k_inverse_BN.masked_fill_(rejected_BN, 0)
    total_BN = _exp_sums(q_BHTD, k_BHTD, q_inverse_BN, k_inverse_BN, index_N)
    into_BN += _exp_sums(
        k_BHTD, q_BHTD, k_inverse_BN, q_inverse_BN, index_N, weight_BN=total_BN.reciprocal_()
    )


def recut_heads(q_BHTD: Tensor, k_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    """Views with heads of a width that suits matrix units, where a token's channels lie together.

    The cosine does not know where a head ends: 16 heads of 72 channels are 18 of 64.
    """
    num_samples, num_heads, num_tokens, head_dim = q_BHTD.shape
    for tensor in (q_BHTD, k_BHTD):
        if num_heads > 1 and tensor.stride(1) != head_dim * tensor.stride(3):
            return q_BHTD, k_BHTD
    for width in _JOINED_WIDTHS:
        if num_heads * head_dim % width == 0:
            cut = (num_samples, num_tokens, num_heads * head_dim // width, width)
            return (
                q_BHTD.transpose(1, 2).reshape(cut).transpose(1, 2),
                k_BHTD.transpose(1, 2).reshape(cut).transpose(1, 2),
            )
    return q_BHTD, k_BHTD


def _inverse_norms(tokens_BHTD: Tensor, index_N: Tensor | None, num_tokens: int) -> Tensor:
    num_samples, num_heads = tokens_BHTD.shape[:2]
    inverse_BN = tokens_BHTD.new_empty(num_samples, num_tokens, dtype=torch.float32)
    tile = tiles("attention_flow_inverse_norms", tokens_BHTD.device)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_ROWS"]), num_samples)
    _inverse_norms_kernel[grid](
        tokens_BHTD,
        index_N,
        inverse_BN,
        num_tokens,
        num_heads,
        *tokens_BHTD.stride(),
        **head_constants(tokens_BHTD, tokens_BHTD),
        **tile,
    )
    return inverse_BN


def _exp_sums(
    a_BHTD: Tensor,
    b_BHTD: Tensor,
    a_inverse_BN: Tensor,
    b_inverse_BN: Tensor,
    index_N: Tensor | None,
    weight_BN: Tensor | None = None,
) -> Tensor:
    num_samples, num_tokens = a_inverse_BN.shape
    num_heads, head_dim = a_BHTD.shape[1], a_BHTD.shape[3]
    tile = tiles(
        "attention_flow_exp_sums",
        a_BHTD.device,
        head_dim=head_dim,
        element_bytes=a_BHTD.element_size(),
    )
    row_blocks = triton.cdiv(num_tokens, tile["BLOCK_ROWS"])
    column_blocks = triton.cdiv(num_tokens, tile["BLOCK_COLUMNS"])
    # A few samples alone would leave most of the GPU idle: several programs share a row block.
    num_shares = min(column_blocks, triton.cdiv(_MIN_PROGRAMS, num_samples * row_blocks))
    sums_BSN = a_inverse_BN.new_empty(num_samples, num_shares, num_tokens)
    _exp_sums_kernel[(row_blocks, num_shares, num_samples)](
        a_BHTD,
        b_BHTD,
        index_N,
        a_inverse_BN,
        b_inverse_BN,
        weight_BN,
        sums_BSN,
        num_tokens,
        num_heads,
        num_shares,
        *a_BHTD.stride(),
        *b_BHTD.stride(),
        **head_constants(a_BHTD, b_BHTD),
        **tile,
    )
    return sums_BSN.sum(dim=1)
