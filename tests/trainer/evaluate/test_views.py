"""View consistency of tokens that say what is at their place, and of tokens that do not."""

import pytest
import torch

from tests.trainer.evaluate.planting import (
    GRID,
    PATCH,
    SIZE,
    NoiseSubject,
    PlantedSubject,
    SameSubject,
    pictures,
)
from trainer.evaluate.views import View, agreement, cut, matches, picture_side, view_consistency


def consistency(subject, count=4):
    return view_consistency(subject.encode, pictures(count).larger_BLL, size=SIZE, patch_size=PATCH)


def mean(values):
    return sum(values) / len(values)


def test_tokens_of_their_places_agree_fully():
    found = consistency(PlantedSubject(spurious=False))

    assert [one.margin for one in found["shift"]] == pytest.approx([1.0] * 4)
    assert [one.retrieval for one in found["shift"]] == [1.0] * 4


def test_a_token_that_is_the_same_everywhere_says_nothing():
    found = consistency(SameSubject())

    for kind in ("shift", "zoom"):
        assert [one.margin for one in found[kind]] == pytest.approx([0.0] * 4, abs=1e-6)
        assert mean([one.retrieval for one in found[kind]]) < 0.2


def test_noise_is_found_again_by_chance():
    found = consistency(NoiseSubject(), count=8)

    # A match within one patch: at most 9 of 64 places.
    for kind in ("shift", "zoom"):
        assert mean([one.margin for one in found[kind]]) == pytest.approx(0, abs=0.03)
        assert mean([one.retrieval for one in found[kind]]) < 0.2


def test_fixed_patterns_cost_retrieval():
    is_lost = agreement_of(spurious=range(16))
    is_clean = agreement_of(spurious=())

    assert is_clean == (1.0, 1.0)
    assert is_lost.margin < 0.95
    assert is_lost.retrieval == pytest.approx((64 - 16 + found_by_luck(16)) / 64)


def agreement_of(spurious):
    tokens = torch.eye(65)[:64]
    for index in spurious:
        tokens[index] = torch.eye(65)[64]
    every = torch.arange(64)
    return agreement(tokens, tokens, every, every, grid_side=8)


def found_by_luck(count):
    """Of the first `count` tokens all match the first one best: those beside it are right."""
    return sum(index // 8 <= 1 and index % 8 <= 1 for index in range(count))


def test_a_shift_matches_tokens_of_the_same_pixels():
    side = picture_side(SIZE, PATCH)
    numbered = torch.arange(side * side).view(side, side)
    here, there = matches(View(0, 8, SIZE), View(8, 0, SIZE), GRID)

    def corners(view):
        window = numbered[view.top : view.top + SIZE, view.left : view.left + SIZE]
        return window[::PATCH, ::PATCH].flatten()

    assert side == SIZE + 2 * PATCH
    assert len(here) == 6 * 6
    assert torch.equal(corners(View(0, 8, SIZE))[here], corners(View(8, 0, SIZE))[there])


def test_a_zoom_matches_tokens_around_the_middle():
    whole, middle = View(0, 0, 32), View(4, 4, 24)

    here, there = matches(middle, whole, 8)
    back, _ = matches(whole, middle, 8)

    assert here.tolist() == list(range(64))
    assert there[0] == 1 * 8 + 1  # its middle is 5.5 px from the edge
    assert there[-1] == 6 * 8 + 6
    assert len(back) == 6 * 6


def test_a_view_is_cut_and_enlarged():
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    picture[:, 4:28, 4:28] = 200

    assert (cut(picture, View(4, 4, 24), 32) == 200).all()
    assert cut(picture, View(8, 8, 32), 32).shape == (3, 32, 32)
