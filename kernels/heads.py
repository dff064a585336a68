"""How channels are cut into tiles, and how rows of them are loaded 16 bytes at a time.

Matrix units want powers of two. A head of 72 channels padded to 128 would cost 1.6 times the
multiplications of one cut into 64 and 16.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * log2(e)), and exp2 is in hardware
LN_2 = tl.constexpr(0.6931471805599453)
_MIN_TILE = 16  # tl.dot multiplies at least so many channels


def split_width(head_dim: int) -> tuple[int, int]:
    """Two tile widths that cover a head: powers of two, the second 0 where one tile does.

    64 -> (64, 0), 72 and 80 -> (64, 16), 88 and 96 -> (64, 32), 104 and more -> (128, 0).
    """
    whole: int = max(_MIN_TILE, triton.next_power_of_2(head_dim))
    first = whole // 2
    if first < _MIN_TILE or whole == head_dim:
        return whole, 0
    second: int = max(_MIN_TILE, triton.next_power_of_2(head_dim - first))
    return (first, second) if second < first else (whole, 0)


def is_aligned(*strides: int) -> bool:
    """Whether every stride is a whole number of 8 elements: 16 byte loads of 2 byte numbers."""
    return all(stride % 8 == 0 for stride in strides)


@triton.jit
def head_offset(batch, head, stride_b, stride_h, ALIGNED: tl.constexpr):
    """Offset of a head's first element, int64.

    The compiler sees no divisibility in `head * 72` and would load 2 bytes at a time. The hints
    belong on the products, not on the strides; on the sum one is lost where there is one head.
    """
    of_batch, of_head = batch.to(tl.int64) * stride_b, head.to(tl.int64) * stride_h
    if ALIGNED:
        of_batch, of_head = tl.multiple_of(of_batch, 8), tl.multiple_of(of_head, 8)
    return of_batch + of_head


@triton.jit
def row_offset(row, stride, ALIGNED: tl.constexpr):
    """Offsets of a head's rows, with the same hint; of the type of `row` and `stride`."""
    offset = row * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def load_channels(
    base_ptr, starts, exists, stride_d, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Channels FIRST to FIRST + WIDTH of some rows; what does not exist is 0."""
    channels = FIRST + tl.arange(0, WIDTH)
    mask = exists[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (channels < D)[None, :]
    return tl.load(base_ptr + starts[:, None] + channels[None, :] * stride_d, mask=mask, other=0.0)
