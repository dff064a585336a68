"""How a head's channels are cut into tiles."""

import pytest

from kernels.heads import is_aligned, split_width


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_tiles_cover_a_head_and_are_powers_of_two(head_dim):
    first, second = split_width(head_dim)

    assert head_dim <= first + second <= max(16, 2 * head_dim)
    assert first.bit_count() == 1
    assert second == 0 or (second.bit_count() == 1 and 16 <= second < first)


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [
        (8, (16, 0)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (88, (64, 32)),
        (96, (64, 32)),
        (104, (128, 0)),
        (128, (128, 0)),
    ],
)
def test_served_heads_are_padded_as_little_as_two_tiles_can(head_dim, widths):
    assert split_width(head_dim) == widths


def test_strides_are_aligned_when_all_are_whole_16_byte_vectors():
    assert is_aligned(72, 0, 3456)
    assert not is_aligned(72, 4)
