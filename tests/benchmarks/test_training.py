"""The plain step of `benchmarks.train` is the trainer's step."""

import argparse

import pytest
import torch

from benchmarks.training import measure
from tests.support import tiny_backbone


@pytest.fixture
def arguments(monkeypatch):
    def load(_name, **_settings):
        backbone = tiny_backbone()
        with torch.no_grad():
            for block in backbone.vit.blocks:
                block.attn.qkv.weight.mul_(20)  # else attention is all but uniform
        return backbone

    monkeypatch.setattr(measure.Backbone, "load", load)
    settings = {"backbone": "tiny", "device": "cpu", "precision": "fp32", "recipe": "paper"}
    return argparse.Namespace(**settings, batch=2, size=64, set=[], steps=1, warmup=0)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["filters.fp_gp.threshold=1.5", "loss.matched=false", "loss.affinity_floor=0.2"],
        ["filters.fp_gp.threshold=-10"],
    ],
)
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_loss_and_gradients_are_those_of_the_plain_step(arguments, recipe, settings):
    arguments.recipe, arguments.set = recipe, settings

    differences = measure.check(arguments)

    assert differences["loss_difference"] < 1e-5
    assert differences["gradient_difference"] < 1e-3


@pytest.mark.parametrize("kind", ["ours", "checkpointed", "baseline"])
def test_a_measurement_has_every_figure(arguments, kind):
    measured = measure.measure(arguments, kind)

    assert measured["images_per_second"] > 0
    assert measured["tflop_per_image"] > 0
    assert measured["precision"] == "fp32"
    assert set(measured["stages"]) == {
        "data",
        "student",
        "teacher",
        "filters",
        "losses",
        "backward",
        "optimiser",
    }
    assert all(seconds > 0 for seconds in measured["stages"].values())
    assert "mfu" not in measured  # of a CPU no peak is known
