import pytest
import torch
from torch import Tensor

from trainer.evaluate.probe import (
    IGNORE,
    ProbeError,
    ProbeSettings,
    linear_probe,
    scores_from_confusion,
)

NUM_CLASSES = 4
FAST = ProbeSettings(learning_rates=(1e-2, 3e-2), num_steps=60, batch_size=8)


def blocky_labels(count: int, *, seed: int) -> list[Tensor]:
    """Label maps of 4x6 tokens of 8 px, one class per token."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(NUM_CLASSES, (count, 4, 6), generator=generator)
    return list(coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).to(torch.uint8))


def telling_tokens(labels: list[Tensor], *, seed: int) -> list[Tensor]:
    """Tokens that hold their own class in four of twelve noisy channels."""
    generator = torch.Generator().manual_seed(seed)
    grids = []
    for label in labels:
        one_hot = torch.nn.functional.one_hot(label[::8, ::8].long(), NUM_CLASSES).float()
        grids.append(torch.cat([one_hot, torch.randn(4, 6, 8, generator=generator)], dim=-1))
    return grids


def noise_tokens(count: int, *, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 4, 6, 12, generator=torch.Generator().manual_seed(seed)))


def test_tokens_that_hold_the_labels_are_probed_almost_perfectly():
    train, val = blocky_labels(24, seed=0), blocky_labels(8, seed=1)

    result = linear_probe(
        telling_tokens(train, seed=2),
        train,
        telling_tokens(val, seed=3),
        val,
        num_classes=NUM_CLASSES,
        settings=FAST,
    )

    assert max(result.miou_by_learning_rate.values()) > 0.95
    # Bilinear logits round off the corners where four tokens of 8 px meet.
    assert result.scores.pixel_accuracy > 0.9


def test_noise_is_probed_at_chance():
    train, val = blocky_labels(24, seed=0), blocky_labels(8, seed=1)

    result = linear_probe(
        noise_tokens(24, seed=2),
        train,
        noise_tokens(8, seed=3),
        val,
        num_classes=NUM_CLASSES,
        settings=FAST,
    )

    assert result.scores.pixel_accuracy == pytest.approx(1 / NUM_CLASSES, abs=0.1)


def test_a_probe_is_not_held_up_by_correlated_or_constant_channels():
    train, val = blocky_labels(24, seed=0), blocky_labels(8, seed=1)
    # A thirtieth of a channel is its own, the rest is shared by twelve; the thirteenth is dead.
    mix = torch.eye(13, 12) / 30 + torch.ones(13, 12) * (torch.arange(13) < 12)[:, None]

    def mixed(labels: list[Tensor], seed: int) -> list[Tensor]:
        return [tokens @ mix.T for tokens in telling_tokens(labels, seed=seed)]

    result = linear_probe(
        mixed(train, 2),
        train,
        mixed(val, 3),
        val,
        num_classes=NUM_CLASSES,
        settings=FAST,
    )

    assert max(result.miou_by_learning_rate.values()) > 0.95


def test_a_probe_repeats_with_its_seed():
    train, val = blocky_labels(12, seed=0), blocky_labels(4, seed=1)

    def probe() -> float:
        return linear_probe(
            noise_tokens(12, seed=2),
            train,
            noise_tokens(4, seed=3),
            val,
            num_classes=NUM_CLASSES,
            settings=FAST,
        ).scores.miou

    assert probe() == probe()


def test_ignored_pixels_and_absent_classes_do_not_count():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])

    scores = scores_from_confusion(confusion)

    assert scores.class_iou == (3 / 4, 4 / 5, None)
    assert scores.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1) / 2)
    assert scores.pixel_accuracy == pytest.approx(7 / 8)


def test_labels_may_have_any_size_and_each_image_its_own():
    train, val = blocky_labels(12, seed=0), blocky_labels(4, seed=1)
    val = [label[: 30 - index, : 47 - index] for index, label in enumerate(val)]

    result = linear_probe(
        noise_tokens(12, seed=2),
        train,
        noise_tokens(4, seed=3),
        val,
        num_classes=NUM_CLASSES,
        settings=FAST,
    )

    assert 0.0 <= result.scores.miou <= 1.0


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        ([], [], "no images"),
        (noise_tokens(2, seed=0), blocky_labels(1, seed=0), "2 token grids but 1 labels"),
        ([torch.zeros(24, 12)], blocky_labels(1, seed=0), r"must be\s+\[h, w, C\]"),
        ([torch.full((4, 6, 12), torch.inf)], blocky_labels(1, seed=0), "not finite"),
        (noise_tokens(1, seed=0), [torch.zeros(1, 32, 48)], r"must be \[H, W\]"),
        (noise_tokens(1, seed=0), [torch.full((32, 48), 9)], "holds class 9; classes are 0 to 3"),
        (noise_tokens(1, seed=0), [torch.full((32, 48), IGNORE)], "every training label"),
    ],
)
def test_what_cannot_be_probed_is_named(tokens, labels, message):
    with pytest.raises(ProbeError, match=message):
        linear_probe(
            tokens,
            labels,
            noise_tokens(1, seed=1),
            blocky_labels(1, seed=1),
            num_classes=NUM_CLASSES,
            settings=FAST,
        )
