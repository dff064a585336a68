import logging

import pytest
import torch

from trainer.evaluate.heads import Heads, train_heads, warn_of_edge
from trainer.evaluate.points import PointBatches, Points, ProbeError


def make_heads(num_heads=2):
    return Heads(
        num_heads,
        3,
        2,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )


def train(heads, loss, learning_rates=(1e-2, 1e-1)):
    position = torch.arange(4, dtype=torch.int32)
    batches = PointBatches(
        [torch.ones(2, 2, 3)],
        [Points(position, position, (2, 2), 1.0)],
        batch_size=4,
        points_per_image=4,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    train_heads(
        heads,
        batches,
        lambda features: features,
        loss,
        learning_rates=learning_rates,
        num_steps=3,
        weight_decay=0.0,
    )


def test_all_heads_start_alike_and_one_alone_gives_what_it_gives_among_all():
    heads = make_heads()
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

    outputs = heads(features)

    assert outputs.shape == (5, 2, 2)
    assert torch.equal(outputs[:, 0], outputs[:, 1])
    torch.testing.assert_close(heads(features, only=1), outputs[:, 1:])


def test_each_head_learns_at_its_own_rate():
    heads, untouched = make_heads(), make_heads()

    train(heads, lambda outputs, _: outputs.sum())

    moved = [
        (after - before).abs().max().item()
        for after, before in zip(heads.weights, untouched.weights, strict=True)
    ]
    # Adam's steps are as long as its rate, whatever the gradient.
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(ProbeError, match="nan in step 0 of 3; leave out the largest .* 0.1"):
        train(make_heads(), lambda outputs, _: (outputs * torch.nan).sum())


@pytest.mark.parametrize(
    ("best", "rates", "expected"),
    [(0.1, (0.1, 1.0), True), (0.1, (0.01, 0.1, 1.0), False), (0.1, (0.1,), False)],
)
def test_only_the_ends_of_a_grid_are_warned_of(best, rates, expected, caplog):
    with caplog.at_level(logging.WARNING):
        assert warn_of_edge("the probe", best, rates) is expected

    assert bool(caplog.records) is expected
