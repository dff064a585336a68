import pytest
import torch

from backbone import RegisterBorder
from tests.support import tiny_backbone
from tests.trainer.refining import SIZE, random_images, small_recipe, small_refiner
from trainer.config import ChannelsSection, FpGpSection
from trainer.doctor.measure import Eye, filter_masks, kept_shares, measure_channels, measure_crops
from trainer.doctor.widths import measure_widths

MIDDLING = ["filters.fp_gp.criterion=zscore", "filters.register_guided.threshold=0.5"]


def reference():
    return random_images(1, seed=2)[0]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["filters.fp_gp.criterion=cosine", "filters.fp_gp.threshold=0.9"],
        ["loss.matched=false"],
        ["filters.attention_hijack.variant=release", "filters.attention_hijack.layers=[0, 1]"],
        ["registers.fill=learnable"],
        ["crops.strip_share=0.6", "crops.num_crops=2"],
    ],
)
def test_the_shares_are_those_of_a_first_training_step(settings):
    recipe = small_recipe(*MIDDLING, *settings)
    refiner = small_refiner(recipe, trained=False)
    images = random_images(2)
    draws = refiner.draw(2, progress=0.0, generator=torch.Generator().manual_seed(4))
    terms = refiner(images, draws).terms

    eye = Eye(tiny_backbone(), refiner.reference_3SS, recipe, channels=[], bf16=False)
    if draws.border is None:
        draws = eye.draw(2, torch.Generator().manual_seed(4))
    scores, _, _ = eye.score(images, draws)
    shares = kept_shares(filter_masks(scores, recipe), recipe)

    expected = {name: float(terms[f"clean_{name}"]) for name in shares if name != "clean"}
    expected["clean"] = float(terms["clean"])
    assert shares == pytest.approx(expected, abs=1e-6)
    assert any(0.05 < share < 0.95 for share in shares.values())


def test_a_filter_that_is_off_is_measured_but_does_not_count():
    recipe = small_recipe(*MIDDLING)
    without = small_recipe(
        *MIDDLING, "filters.fp_gp.enabled=false", "filters.attention_hijack.enabled=false"
    )
    scores = measured(recipe).scores

    masks, fewer = filter_masks(scores, recipe), filter_masks(scores, without)

    assert torch.equal(masks.fixed_pattern, fewer.fixed_pattern)
    assert torch.equal(fewer.clean, fewer.register_guided)
    assert fewer.clean.sum() > masks.clean.sum()


def measured(recipe, count=3, **changes):
    arguments = {"channels": [], "bf16": False, "num_shown": 2} | changes
    return measure_crops(tiny_backbone(), random_images(count), reference(), recipe, **arguments)


def test_every_token_of_every_crop_is_scored_in_every_block():
    scores, shown = measured(small_recipe())

    num_tokens = (SIZE // 16) ** 2
    assert scores.fixed_pattern_QN.shape == (3 * 3, num_tokens)
    assert scores.layer_inflow_LQN.shape == (2, 3 * 3, num_tokens)
    assert [one.crop for one in shown] == [0, 3]
    assert shown[0].view_3SS.shape == (3, SIZE, SIZE)
    assert 0 <= shown[0].view_3SS.min() <= shown[0].view_3SS.max() <= 1


def test_measuring_again_gives_the_same_numbers():
    first, second = measured(small_recipe()).scores, measured(small_recipe()).scores

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masked_channels_are_left_out_of_cosines():
    plain, masked = (measured(small_recipe(), channels=c).scores for c in ([], [0, 1, 2]))

    assert not torch.allclose(plain.fixed_pattern_QN, masked.fixed_pattern_QN)
    assert torch.allclose(plain.layer_inflow_LQN, masked.layer_inflow_LQN)


def test_a_loud_channel_is_found_with_the_cosine_before_and_after():
    tokens = torch.randn(6, 40, 16, generator=torch.Generator().manual_seed(0))
    tokens[..., 5] = 30.0

    found = measure_channels(tokens, ChannelsSection(), seed=0)

    assert found.channels == [5]
    before, after = found.cosines
    assert before > 0.9
    assert abs(after) < 0.2


def test_widths_are_compared_with_the_default():
    backbone = tiny_backbone()

    results = measure_widths(
        backbone,
        RegisterBorder(r_reg=1),  # 4 of 4 patches: the default is among the usual widths
        random_images(2),
        reference(),
        FpGpSection(criterion="zscore", threshold=0.5),
        learned=None,
        channels=[],
        strip_share=0.35,
        bf16=False,
    )

    assert [result.width for result in results] == [0, 1, 2, 3, 4]
    assert results[4].cosine == pytest.approx(1)
    assert max(result.cosine for result in results[:4]) < 1 - 1e-5
    costs = [result.cost for result in results]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(17 / 16)  # class token and 16 patches
    assert all(0 <= result.fp_gp <= 1 for result in results)
    assert 0.1 < results[0].fp_gp < 0.9


def test_a_default_wider_than_the_usual_widths_is_measured_too():
    results = measure_widths(
        tiny_backbone(img_size=96),
        RegisterBorder(r_reg=1, fill="zeros"),
        torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8),
        torch.randint(256, (3, 96, 96), dtype=torch.uint8),
        FpGpSection(),
        learned=None,
        channels=[],
        strip_share=0.35,
        bf16=False,
    )

    assert [result.width for result in results] == [0, 1, 2, 3, 4, 6]
