"""What the kernels of both attention flows share: how they reach tokens where they lie.

Dimension key: B = samples, H = heads, T = all tokens, N = tokens that take part, D = channels of a
head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.heads import is_aligned, split_width


@triton.jit
def token_rows(first, num_tokens, index_ptr, stride_t, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Positions among the N, which of them exist, and where their rows start."""
    positions = first + tl.arange(0, BLOCK)
    exists = positions < num_tokens
    if index_ptr is None:
        tokens = positions.to(tl.int64)
    else:
        tokens = tl.load(index_ptr + positions, mask=exists, other=0)
    starts = tokens * stride_t
    if ALIGNED:
        # As for heads: nothing else tells the compiler that `token * 72` is a whole 16 bytes.
        starts = tl.multiple_of(starts, 8)
    return positions, exists, starts


def head_constants(q_BHTD: Tensor, k_BHTD: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for, besides their tiles."""
    head_dim = q_BHTD.shape[3]
    first, second = split_width(head_dim)
    if q_BHTD.dtype == torch.float32 and first == 128:
        first, second = 64, 64  # a product in three parts of 128 channels spills
    return {
        "D": head_dim,
        "D_1": first,
        "D_2": second,
        "ALIGNED": is_aligned(*q_BHTD.stride()[:3], *k_BHTD.stride()[:3]),
        "enable_fp_fusion": True,
    }
