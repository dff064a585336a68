from dataclasses import replace

import numpy as np
import pytest

from tests.trainer.evaluate.colours import Colours, write_images
from trainer.evaluate.datasets import open_depth
from trainer.evaluate.depth import evaluate_depth
from trainer.evaluate.depth_probe import DepthSettings
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.feature_store import FeatureStore

FAST = DepthSettings(
    learning_rates=(3e-2, 1e-1), num_steps=40, batch_size=4, points_per_image=32, num_bins=16
)


@pytest.fixture
def dataset(tmp_path):
    """Dark is one metre away, bright three."""
    folder = write_images(
        tmp_path / "data",
        "depth",
        lambda bright: (1000 + 2000 * bright.astype(np.uint16)).astype(np.uint16),
    )
    return replace(open_depth(folder, "folder"), max_depth=4.0)


def evaluate(dataset, subjects, store=None, settings=(FAST,)):
    return evaluate_depth(
        dataset,
        subjects,
        store=store or FeatureStore(None),
        size=(32, 48),
        settings_by_seed=settings,
    )


def test_a_backbone_that_sees_the_distance_scores_high(dataset):
    result = evaluate(dataset, [Colours()])

    (row,) = result.rows
    scores = {score.name: score for score in row.scores}
    assert result.task == "depth"
    assert list(scores) == ["RMSE", "AbsRel", "delta_1", "RMSE of all pixels"]
    # A constant has 1 m; rims between columns are rounded off.
    assert scores["RMSE"].interval.mean < 0.4
    assert scores["delta_1"].unit == "percent"
    assert "Eigen et al." in result.protocol
    assert result.settings["depth_range"].endswith(" m")


def test_a_run_that_was_killed_goes_on_with_the_seeds_that_are_missing(dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    short = replace(FAST, num_steps=5)
    first = evaluate(dataset, [Colours()], FeatureStore(tmp_path / "features"), [short])

    settings = [short, replace(short, seed=1)]
    second = evaluate(dataset, [Colours()], FeatureStore(tmp_path / "features"), settings)

    assert sum("found" in m and "/probes/" in m for m in caplog.messages) == 1
    assert second.rows[0].scores[0].values[0] == first.rows[0].scores[0].values[0]


def test_a_data_set_without_a_val_part_is_refused(dataset):
    with pytest.raises(EvaluationError, match="has no val part"):
        evaluate(replace(dataset, val=()), [Colours()])
