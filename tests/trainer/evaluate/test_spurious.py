import pytest
import torch

from backbone import open_model
from tests.support import tiny_artifact
from tests.trainer.evaluate.planting import PATCH, PlantedSubject, pictures
from trainer.evaluate.spurious import (
    Pair,
    SpuriousScores,
    Thresholds,
    pattern_scores,
    spurious_scores,
    spurious_shares,
)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def encoder(tmp_path):
    return open_model(tiny_artifact(tmp_path / "a"), precision="fp32")


def test_an_image_that_is_the_reference_is_all_fixed_pattern(encoder):
    reference = images(1)[0]

    scores = spurious_scores(encoder, [reference], reference)

    torch.testing.assert_close(scores.fixed_pattern, torch.ones(16))


def test_a_flat_image_beside_a_flat_strip_is_all_global_proxy(encoder):
    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    encoder.backbone.vit.pos_embed.zero_()  # only position could tell their tokens apart

    scores = spurious_scores(encoder, [flat], flat)

    assert spurious_shares(scores, Thresholds(0.999, 0.999)).global_proxy == 1.0


def test_every_token_of_every_image_is_scored(encoder):
    batch = images(5)

    scores = spurious_scores(encoder, batch[1:], batch[0], attention_layers=[0, 1])

    assert scores.fixed_pattern.shape == scores.global_proxy.shape == (4 * 16,)
    assert scores.is_hijacked.shape == (4 * 16,)
    assert scores.is_hijacked.any()
    assert not scores.is_hijacked.all()


def test_masked_channels_do_not_count(encoder):
    batch = images(3)

    plain = spurious_scores(encoder, batch[1:], batch[0])
    masked = spurious_scores(encoder, batch[1:], batch[0], channels=[0, 3])

    assert not torch.equal(plain.fixed_pattern, masked.fixed_pattern)


def test_shares_count_tokens_over_the_thresholds():
    scores = SpuriousScores(
        fixed_pattern=torch.tensor([0.9, 0.1, 0.9, 0.1]),
        global_proxy=torch.tensor([0.9, 0.6, 0.1, 0.1]),
        is_hijacked=torch.tensor([False, False, False, True]),
    )

    shares = spurious_shares(scores, Thresholds(0.5, 0.5))

    assert shares == (0.5, 0.5, 0.75, 0.25, 0.0)


def test_thresholds_of_scores_are_mean_plus_deviations():
    scores = SpuriousScores(torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.2]), torch.zeros(2))

    thresholds = Thresholds.of_scores(scores, sigma=1.0)

    assert thresholds.fixed_pattern == pytest.approx(0.5 + 2**-0.5)
    assert thresholds.global_proxy == pytest.approx(0.2)


def test_no_images_is_an_error(encoder):
    with pytest.raises(ValueError, match="no images"):
        spurious_scores(encoder, [], images(1)[0])


def test_another_backbones_patterns_can_be_looked_for(encoder, tmp_path):
    other = open_model(tiny_artifact(tmp_path / "b", seed=1), precision="fp32")
    batch = images(3)

    own = spurious_scores(encoder, batch[1:], batch[0])
    same = spurious_scores(encoder, batch[1:], batch[0], against=encoder)
    others = spurious_scores(encoder, batch[1:], batch[0], against=other)

    assert torch.equal(own.fixed_pattern, same.fixed_pattern)
    assert torch.equal(own.global_proxy, same.global_proxy)
    assert not torch.equal(own.fixed_pattern, others.fixed_pattern)
    assert not torch.equal(own.global_proxy, others.global_proxy)


def planted_shares(refined):
    raw = PlantedSubject()
    planted = pictures(count=4, num_fixed=6, num_proxy=10)
    found = pattern_scores(
        [lambda images: [raw.encode(images)], lambda images: [refined.encode(images)]],
        [Pair(0, 0), Pair(1, 0), Pair(1, 1)],
        planted.images_BSS,
        planted.reference_3SS,
        patch_size=PATCH,
    )
    return [spurious_shares(scores, Thresholds()) for (scores,) in found]


def test_planted_patterns_are_found_in_the_shares_that_they_have():
    raw, same, own = planted_shares(PlantedSubject("refined"))

    # The strip has fixed patterns too.
    assert raw[:3] == (6 / 64, 16 / 64, 16 / 64)
    assert raw == same == own


def test_a_backbone_without_them_has_none_by_either_patterns():
    raw, raw_patterns, own_patterns = planted_shares(PlantedSubject("refined", spurious=False))

    assert raw.fp_gp == 16 / 64
    assert raw_patterns.fp_gp == own_patterns.fp_gp == 0


def test_every_side_of_the_canvas_has_its_strip_and_every_image_its_scores():
    widths = []

    def encode(images):
        widths.append(tuple(images.shape[-2:]))
        return [PlantedSubject().encode(images)]

    planted = pictures(count=4)
    ((scores,),) = pattern_scores(
        [encode], [Pair(0, 0)], planted.images_BSS, planted.reference_3SS, patch_size=PATCH
    )

    # The reference image, then each image alone and beside a strip of two patches.
    assert widths[0::2] == [(32, 32), (32, 40), (40, 32), (32, 40), (40, 32)]
    assert widths[1::2] == [(32, 32)] * 4
    assert [len(one.global_proxy) for one in scores.by_image(4)] == [64] * 4


def test_layers_are_scored_apart():
    clean, raw = PlantedSubject("clean", spurious=False), PlantedSubject()
    planted = pictures(count=2)

    ((first, last),) = pattern_scores(
        [lambda images: [clean.encode(images), raw.encode(images)]],
        [Pair(0, 0)],
        planted.images_BSS,
        planted.reference_3SS,
        patch_size=PATCH,
    )

    assert spurious_shares(first, Thresholds()).fp_gp == 0
    assert spurious_shares(last, Thresholds()).fp_gp == 16 / 64
