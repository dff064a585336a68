import pytest
import torch

from tests.trainer.refining import small_recipe
from trainer.doctor.measure import CropScores
from trainer.doctor.suggest import (
    advise_fp_gp,
    advise_layers,
    advise_register_guided,
    advise_width,
    find_threshold,
    find_valley,
    tail_shares,
)
from trainer.doctor.widths import WidthResult


def normal(mean, std, *shape, seed=0):
    return mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores(fixed, proxy=None, register=None, inflow=None):
    proxy = torch.zeros_like(fixed) if proxy is None else proxy
    register = torch.zeros_like(fixed) if register is None else register
    inflow = torch.ones(3, *fixed.shape) if inflow is None else inflow
    return CropScores(fixed, proxy, register, torch.ones_like(fixed), inflow)


def test_a_threshold_that_keeps_a_middling_share_is_left_alone():
    advice = advise_fp_gp(scores(normal(0.45, 0.1, 20, 50)), small_recipe())

    assert advice.settings == ()
    assert "as it should be" in advice.text


def test_two_humps_are_parted_at_the_valley():
    low, high = normal(0.55, 0.03, 30, 40), normal(0.8, 0.03, 30, 40, seed=1)

    advice = advise_fp_gp(scores(torch.cat([low, high[:, :25]], dim=1)), small_recipe())

    (setting,) = advice.settings
    name, value = setting.split("=")
    assert name == "filters.fp_gp.threshold"
    assert 0.62 < float(value) < 0.74
    assert "two humps" in advice.text


def test_one_hump_gets_the_value_that_keeps_sixty_percent():
    values = normal(0.7, 0.1, 30, 100)

    advice = advise_fp_gp(scores(values), small_recipe())

    (setting,) = advice.settings
    kept = (values < float(setting.split("=")[1])).float().mean()
    assert 0.55 < kept < 0.65
    assert "no two humps" in advice.text


def test_the_higher_of_both_scores_decides():
    fixed, proxy = normal(0.3, 0.1, 30, 100), normal(0.7, 0.1, 30, 100, seed=1)

    advice = advise_fp_gp(scores(fixed, proxy), small_recipe())

    value = float(advice.settings[0].split("=")[1])
    assert 0.55 < (torch.maximum(fixed, proxy) < value).float().mean() < 0.65


def test_cosines_that_are_all_alike_get_deviations_instead():
    values = normal(0.95, 0.005, 30, 100) + normal(0, 0.01, 30, 1, seed=1)

    advice = advise_fp_gp(scores(values, values), small_recipe())

    assert advice.settings[0] == "filters.fp_gp.criterion=zscore"
    sigma = float(advice.settings[1].split("=")[1])
    zscores = (values - values.mean(-1, True)) / values.std(-1, keepdim=True)
    assert 0.4 <= (zscores < sigma).float().mean() <= 0.8


def test_a_recipe_of_deviations_stays_one():
    recipe = small_recipe("filters.fp_gp.criterion=zscore", "filters.fp_gp.threshold=4")

    advice = advise_fp_gp(scores(normal(0.95, 0.005, 30, 100)), recipe)

    (setting,) = advice.settings
    assert setting.startswith("filters.fp_gp.threshold=")


def test_equal_scores_do_not_break_the_search_for_a_threshold():
    assert find_valley(torch.full((4, 5), 0.9)) is None
    assert find_threshold(torch.full((4, 5), 0.9)).value == pytest.approx(0.9)


def test_registers_that_take_nearly_everything_get_a_higher_threshold():
    lenient = advise_register_guided(scores(normal(0, 1, 5, 9), register=normal(0.3, 0.05, 5, 9)),
                                     small_recipe())  # fmt: skip
    strict = advise_register_guided(
        scores(normal(0, 1, 30, 90), register=normal(0.85, 0.05, 30, 90)), small_recipe()
    )

    assert lenient.settings == ()
    (setting,) = strict.settings
    assert 0.8 < float(setting.removeprefix("filters.register_guided.threshold=")) < 0.9


def inflow_with_tail(depth, heavy, *, size=1.0):
    """Inflow near 1 everywhere; in the blocks `heavy` a few tokens draw a multiple of it."""
    inflow = normal(1.0, 0.1, depth, 12, 100).clamp(min=0.1)
    for layer in heavy:
        inflow[layer, :, :3] += 20 * size
    return inflow


def test_the_blocks_with_the_heaviest_tail_are_suggested():
    recipe = small_recipe("filters.attention_hijack.layers=[8, 9]")
    inflow = inflow_with_tail(12, [4, 5])

    advice = advise_layers(scores(inflow[0], inflow=inflow), recipe)

    assert advice.settings == ("filters.attention_hijack.layers=[4, 5]",)
    tails = tail_shares(inflow)
    assert min(tails[4], tails[5]) > 3 * max(tails[:4] + tails[6:])


def test_blocks_that_are_as_good_are_left_alone():
    recipe = small_recipe("filters.attention_hijack.layers=[4, 5]")
    inflow = inflow_with_tail(12, [4, 5, 6, 7])

    assert advise_layers(scores(inflow[0], inflow=inflow), recipe).settings == ()


def test_one_odd_block_and_the_outermost_do_not_choose_the_range():
    recipe = small_recipe("filters.attention_hijack.layers=[8, 10]")
    inflow = inflow_with_tail(18, [0, 1, 2, 6, 7, 8, 12, 15, 16, 17])

    advice = advise_layers(scores(inflow[0], inflow=inflow), recipe)

    assert advice.settings == ("filters.attention_hijack.layers=[6, 8]",)


def test_attention_that_is_nearly_even_has_no_hijackees():
    inflow = inflow_with_tail(12, [])
    on, off = (small_recipe(f"filters.attention_hijack.enabled={v}") for v in ("true", "false"))

    assert advise_layers(scores(inflow[0], inflow=inflow), on).settings == (
        "filters.attention_hijack.enabled=false",
    )
    assert advise_layers(scores(inflow[0], inflow=inflow), off).settings == ()


@pytest.mark.parametrize(
    ("shares", "default", "best"),
    [
        ([0.5, 0.4, 0.3, 0.295, 0.29], 1, 2),
        ([0.5, 0.4, 0.41, 0.42, 0.43], 1, 1),
        ([0.1, 0.4, 0.4, 0.4, 0.2], 1, 4),
        ([0.1, 0.2, 0.4, 0.405, 0.42], 2, 2),
    ],
)
def test_the_narrowest_good_width_from_the_default_on_is_suggested(shares, default, best):
    results = [WidthResult(w, share, 0.9, 1.0 + w / 10) for w, share in enumerate(shares)]

    for refined in (True, False):
        width, advice = advise_width(results, default, refined=refined)
        assert width == best
        assert ("untrained" in advice.text) != refined
        assert ("register_width=" in advice.text) == (refined and best != default)
