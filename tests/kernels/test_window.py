"""The image's tokens inside a longer sequence."""

import pytest
import torch

from backbone.registers import strip
from kernels import TokenWindow


def test_the_index_picks_what_stripping_keeps():
    window = TokenWindow(grid=(3, 5), border=2, prefix=1)
    tokens = torch.arange(window.num_tokens, dtype=torch.float32)[None, :, None]

    kept = tokens[:, window.image_index()]

    assert torch.equal(kept, strip(tokens[:, 1:], (3, 5), 2).image)
    assert torch.equal(window.kept_index()[:1], torch.tensor([0]))
    assert torch.equal(window.kept_index()[1:], window.image_index())


def test_without_border_and_prefix_it_is_the_whole_sequence():
    window = TokenWindow(grid=(3, 5))

    assert window.num_tokens == window.num_image_tokens == 15
    assert torch.equal(window.kept_index(), torch.arange(15))


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="9 tokens do not fill a grid of 2x2 with a border of 1"):
        TokenWindow((2, 2), border=1).check(9)


@pytest.mark.parametrize("window", [TokenWindow((-1, 2)), TokenWindow((4, 4), border=-1)])
def test_negative_numbers_are_refused(window):
    with pytest.raises(ValueError, match="negative"):
        window.check(window.num_tokens)
