"""The channel mask and the common normalisation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.channels import find_channel_mask, mask_channels, unit_tokens

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def bank(constants, *, channels=24, seed=0):
    """Tokens of noise, some channels of which carry a nearly constant large value."""
    tokens = torch.randn(10, 40, channels, generator=torch.Generator().manual_seed(seed))
    for channel, value in constants.items():
        tokens[..., channel] += value
    return tokens


def test_channels_equal_the_authors():
    golden = load_file(GOLDEN / "channel_mask.safetensors")

    mask = find_channel_mask(golden["feature_bank"])

    # The golden file lists them in ascending order.
    assert sorted(mask.channels) == golden["masked_channels"].tolist()
    assert mask.stop_reason == "threshold"
    assert mask.cosine == pytest.approx(0.012851560488343239, rel=1e-4)


def test_planted_channels_are_found_strongest_first():
    mask = find_channel_mask(bank({3: 40.0, 17: -20.0}))

    assert mask.channels == [3, 17]
    assert mask.stop_reason == "threshold"


def test_a_bank_without_common_channels_loses_none():
    mask = find_channel_mask(bank({}))

    assert mask.channels == []
    assert mask.stop_reason == "threshold"


def test_the_search_ends_at_the_most_channels_allowed():
    mask = find_channel_mask(bank({1: 80.0, 2: 40.0, 3: 20.0}), max_channels=2)

    assert mask.channels == [1, 2]
    assert mask.stop_reason == "max_channels"


def test_a_likeness_spread_over_all_channels_costs_none_of_them():
    spread_out = bank(dict.fromkeys(range(200), 3.0), channels=200)

    mask = find_channel_mask(spread_out)

    assert mask.channels == []
    assert mask.stop_reason == "gain"
    assert mask.cosine > 0.8


def test_a_bank_narrower_than_the_pool_is_searched_whole():
    mask = find_channel_mask(bank({0: 50.0}, channels=4), candidate_pool=16)

    assert mask.channels == [0]


def test_the_same_bank_gives_the_same_mask_in_sixteen_bits_under_autocast():
    tokens = bank({3: 40.0, 17: -20.0}).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = find_channel_mask(tokens)

    assert mask == find_channel_mask(tokens)


def test_unit_tokens_have_unit_norm_without_the_masked_channels():
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = torch.tensor([2, 5])

    unit = unit_tokens(tokens.requires_grad_(), channels)

    assert not unit[..., channels].any()
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t: unit_tokens(t, channels), tokens)


def test_unit_tokens_come_in_float32_from_sixteen_bits():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unit = unit_tokens(torch.ones(1, 2, 4, dtype=torch.bfloat16))

    assert unit.dtype == torch.float32
    assert unit.tolist() == [[[0.5] * 4] * 2]


def test_no_mask_leaves_tokens_as_they_are():
    tokens = torch.randn(1, 2, 3)

    assert mask_channels(tokens, None) is tokens
