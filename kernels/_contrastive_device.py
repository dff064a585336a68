"""The logsumexp of rows of similarities with a floor, and its gradient in their place.

Dimension key: G = column sets, x = rows of a chunk, M = columns, X = all rows together (G * x).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.heads import LN_2, LOG2_E
from kernels.tiles import tiles


@triton.jit
def _floored_logsumexp_kernel(
    similarity_ptr,  # [X, M] float32; holds the coefficients of the gradient afterwards
    weights_ptr,  # [X] float32
    logsumexp_ptr,  # [X] float32
    threshold_ptr,  # [] float32
    replacement_ptr,  # [] float32, or None where HAS_REPLACEMENT is false
    num_rows,  # X
    num_columns,  # M
    temperature,
    HAS_REPLACEMENT: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    is_row = row < num_rows
    row_tile_ptr = similarity_ptr + row.to(tl.int64)[:, None] * num_columns
    floor = tl.load(threshold_ptr)
    per_temperature = 1.0 / tl.cast(temperature, tl.float32)
    # Rows of weight 0 are not read: they count as rows of zeros.
    weight = tl.load(weights_ptr + row, mask=is_row, other=0.0)
    counts = (weight != 0)[:, None]
    if HAS_REPLACEMENT:
        constant = tl.load(replacement_ptr)

    # Powers of 2 instead of e: the exponent is scaled once, and exp2 is what the hardware has.
    highest = tl.full([BLOCK_X], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_X], dtype=tl.float32)
    for start in tl.range(0, num_columns, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)[None, :]
        value = tl.load(row_tile_ptr + column, mask=counts & (column < num_columns), other=0.0)
        if HAS_REPLACEMENT:
            value = tl.where(value < floor, constant, value)
        power = tl.where(column < num_columns, value * (per_temperature * LOG2_E), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(power, axis=1))
        block_total = tl.sum(tl.exp2(power - new_highest[:, None]), axis=1)
        total = total * tl.exp2(highest - new_highest) + block_total
        highest = new_highest
    log2_total = highest + tl.log2(total)
    tl.store(logsumexp_ptr + row, log2_total * LN_2, mask=is_row)

    if WANTS_GRADIENT:
        scale = (weight * per_temperature)[:, None]
        for start in tl.range(0, num_columns, BLOCK_M):
            column = start + tl.arange(0, BLOCK_M)[None, :]
            is_column = column < num_columns
            value = tl.load(row_tile_ptr + column, mask=counts & is_column, other=0.0)
            power = value * (per_temperature * LOG2_E)
            coefficient = tl.exp2(power - log2_total[:, None]) * scale
            coefficient = tl.where(value < floor, 0.0, coefficient)
            tl.store(row_tile_ptr + column, coefficient, mask=is_row[:, None] & is_column)


def launch_floored_logsumexp(
    similarity_GxM: Tensor,
    weights_Gx: Tensor,
    threshold: Tensor,
    replacement: Tensor | None,
    *,
    temperature: float,
    wants_gradient: bool,
) -> Tensor:
    """`logsumexp_Gx` of a chunk of similarities, by the kernel; rows of weight 0 have no meaning.

    Where the gradient is wanted, the similarities a_ij (contiguous) are overwritten with its
    coefficients: d(sum of weighted logsumexp) / d a_ij.
    """
    num_columns = similarity_GxM.shape[-1]
    weights_Gx = weights_Gx.contiguous()
    logsumexp_Gx = torch.empty_like(weights_Gx)
    settings = tiles("floored_logsumexp", similarity_GxM.device, num_columns=num_columns)
    num_rows = logsumexp_Gx.numel()
    _floored_logsumexp_kernel[(triton.cdiv(num_rows, settings["BLOCK_X"]),)](
        similarity_GxM,
        weights_Gx,
        logsumexp_Gx,
        threshold,
        replacement,
        num_rows,
        num_columns,
        temperature,
        HAS_REPLACEMENT=replacement is not None,
        WANTS_GRADIENT=wants_gradient,
        enable_fp_fusion=True,
        **settings,
    )
    return logsumexp_Gx


def floored_logsumexp(
    similarity_GxM: Tensor,
    weights_Gx: Tensor,
    threshold: Tensor,
    replacement: Tensor | None,
    *,
    temperature: float,
    wants_gradient: bool,
) -> Tensor:
    """`launch_floored_logsumexp` by plain PyTorch, likewise in place."""
    is_below_GxM = similarity_GxM < threshold
    if replacement is not None:
        similarity_GxM.masked_fill_(is_below_GxM, replacement)
    similarity_GxM.div_(temperature)
    logsumexp_Gx = similarity_GxM.logsumexp(dim=-1)
    if wants_gradient:
        scale_Gx = weights_Gx / temperature
        similarity_GxM.sub_(logsumexp_Gx[..., None]).exp_().mul_(scale_Gx[..., None])
        similarity_GxM.masked_fill_(is_below_GxM.logical_or_((weights_Gx == 0)[..., None]), 0)
    return logsumexp_Gx
