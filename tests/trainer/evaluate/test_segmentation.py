import json
from dataclasses import replace

import pytest

from tests.trainer.evaluate.colours import Colours, write_images
from trainer.evaluate.datasets import open_segmentation
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.probe import ProbeSettings
from trainer.evaluate.segmentation import evaluate_segmentation

FAST = ProbeSettings(learning_rates=(1e-1, 3e-1), num_steps=30, batch_size=4, points_per_image=64)


@pytest.fixture
def dataset(tmp_path):
    folder = write_images(tmp_path / "data", "labels", lambda bright: bright)
    (folder / "classes.json").write_text(json.dumps({"0": "dark", "1": "bright"}))
    return open_segmentation(folder, "folder")


def evaluate(dataset, subjects, store=None, settings=(FAST,), size=(32, 48)):
    return evaluate_segmentation(
        dataset,
        subjects,
        store=store or FeatureStore(None),
        size=size,
        settings_by_seed=settings,
    )


def test_a_backbone_that_sees_the_classes_scores_high(dataset):
    result = evaluate(dataset, [Colours()])

    (row,) = result.rows
    assert result.task == "segmentation"
    assert [score.name for score in row.scores] == ["mIoU", "mAcc", "pixel accuracy"]
    assert 85 < row.scores[0].interval.mean <= 100
    assert set(row.details["class_iou"]) == {"dark", "bright"}
    assert row.details["best_learning_rates"][0] in FAST.learning_rates
    assert "arXiv:2304.07193" in result.protocol
    assert "the best on these same images" in result.protocol


def test_every_subject_has_a_row_and_every_seed_a_value(dataset):
    settings = [replace(FAST, seed=seed, num_steps=5) for seed in (0, 1)]

    result = evaluate(dataset, [Colours(), Colours(name="refined", key="d")], settings=settings)

    assert [row.subject for row in result.rows] == ["raw", "refined", "refined minus raw"]
    assert all(len(row.scores[0].values) == 2 for row in result.rows)
    # The same features and seeds: the same probes.
    assert result.rows[0].scores[0].values == result.rows[1].scores[0].values
    assert result.settings["seeds"] == [0, 1]
    assert "seed" not in result.settings


def test_a_run_that_was_killed_goes_on_with_the_seeds_that_are_missing(dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    first = evaluate(dataset, [Colours()], FeatureStore(tmp_path / "features"))

    settings = [FAST, replace(FAST, seed=1)]
    second = evaluate(dataset, [Colours()], FeatureStore(tmp_path / "features"), settings)

    assert sum("found" in m and "/probes/" in m for m in caplog.messages) == 1
    assert second.rows[0].scores[0].values[0] == first.rows[0].scores[0].values[0]
    assert len(list((tmp_path / "features" / "probes").iterdir())) == 2


def test_another_label_is_another_probe(dataset, tmp_path):
    store = FeatureStore(tmp_path / "features")
    evaluate(dataset, [Colours()], store, [replace(FAST, num_steps=2)])
    target = dataset.train[0].target
    target.write_bytes(dataset.train[1].target.read_bytes() + b"\n")

    evaluate(dataset, [Colours()], store, [replace(FAST, num_steps=2)])

    assert len(list((tmp_path / "features" / "probes").iterdir())) == 2


def test_a_data_set_without_a_train_part_is_refused(dataset):
    with pytest.raises(EvaluationError, match="has no train part"):
        evaluate(replace(dataset, train=()), [Colours()])


def test_nothing_to_measure_is_refused(dataset):
    with pytest.raises(EvaluationError, match="needs a backbone and a seed"):
        evaluate(dataset, [])
