"""The numbers that a run puts into its artifact's card."""

import json
import signal

import pytest
import torch
from rich.console import Console

import trainer.measured
import trainer.run
from backbone import is_artifact, load_artifact, open_model
from tests.trainer.refining import image_folder, model_folder, small_recipe
from trainer.evaluate.record import END, recorded
from trainer.loop import StopRequest
from trainer.measured import DATASET
from trainer.merge import main as merge
from trainer.run import refine

MEASURED = ("run.max_steps=1", "run.measure_images=2", "optim.lr=0.01", "lora.rank=2")


@pytest.fixture
def run(tmp_path):
    image_folder(tmp_path / "images")
    model_folder(tmp_path / "model")

    def run(*settings, stop=None, **changes):
        summary = refine(
            small_recipe(f"backbone.name={tmp_path / 'model'}", *MEASURED, *settings),
            tmp_path / "images",
            tmp_path / "out",
            device=torch.device("cpu"),
            stop=stop or StopRequest(),
            console=Console(quiet=True),
            **changes,
        )
        return summary.artifact

    return run


def evaluations_of(artifact):
    return recorded(load_artifact(artifact).manifest.evaluations)


def test_a_finished_run_has_its_numbers_in_manifest_and_card(run, tmp_path):
    artifact = run("filters.fp_gp.criterion=zscore", "filters.fp_gp.threshold=0.5")

    (result,) = evaluations_of(artifact)
    raw, refined, difference = result.rows
    assert (result.task, result.dataset) == ("spurious", DATASET)
    assert result.settings["size"] == [64, 64]
    assert (result.settings["images"], result.settings["sigma"]) == (2, 0.5)
    assert refined.digest == load_artifact(artifact).manifest.digest
    assert raw.digest == open_model(tmp_path / "model", precision="fp32").digest
    assert difference.subject == "refined minus raw"
    names = {score.name for score in refined.scores}
    assert {"FP or GP", "own FP or GP", "view margin (shift)", "view retrieval (shift)"} <= names
    assert any(score.interval.mean != 0 for score in difference.scores)
    card = (artifact / "README.md").read_text()
    assert card.index("alignment") < card.index("| FP or GP (%)") < card.index("## Use")
    assert str(tmp_path / "out") not in card


def test_what_is_measured_is_the_artifact_as_it_is_served(run, monkeypatch):
    measured = []

    def keep(subjects, *args, **kwargs):
        measured.extend(subject.encode(image) for subject in subjects)
        return evaluate(subjects, *args, **kwargs)

    evaluate, image = trainer.measured.evaluate_spurious, torch.full((1, 3, 64, 64), 7).byte()
    monkeypatch.setattr(trainer.measured, "evaluate_spurious", keep)

    artifact = run("run.weights_dtype=float16", "registers.fill=learnable")

    served = open_model(artifact, precision="fp32").encode(image)[0].tokens
    assert torch.equal(measured[1], served)
    assert not torch.allclose(measured[0], served, atol=1e-3)


def test_no_images_no_numbers(run):
    artifact = run("run.measure_images=0")

    assert not evaluations_of(artifact)
    assert "evaluations" not in json.loads((artifact / "refinery.json").read_text())
    assert "## Measured" not in (artifact / "README.md").read_text()


@pytest.mark.parametrize("function", ["evaluate_spurious", "record", "open_model"])
def test_a_failure_is_a_warning_and_the_artifact_whole(run, monkeypatch, caplog, function):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.measured, function, fail)

    artifact = run()

    assert not evaluations_of(artifact)
    assert "the artifact was not measured: OutOfMemoryError: CUDA out of memory" in caplog.text
    assert f"trainer.evaluate spurious --model {artifact}" in caplog.text


def test_a_stop_request_ends_the_measurement_and_the_run_is_done(run, monkeypatch, caplog):
    stop, seen = StopRequest(), []

    def ask(source, *args, **kwargs):
        seen.append(is_artifact(source))
        stop.signum = signal.SIGTERM
        return read(source, *args, **kwargs)

    read = trainer.measured.open_model
    monkeypatch.setattr(trainer.measured, "open_model", ask)

    artifact = run(stop=stop)

    assert seen == [True]
    assert not evaluations_of(artifact)
    assert "stopped before the artifact was measured" in caplog.text


def test_a_stop_request_while_the_artifact_is_written_loads_nothing_more(run, monkeypatch, caplog):
    stop, loaded = StopRequest(), []

    def write(*args, **kwargs):
        manifest = save(*args, **kwargs)
        stop.signum = signal.SIGTERM
        return manifest

    save = trainer.run.save_artifact
    monkeypatch.setattr(trainer.run, "save_artifact", write)
    monkeypatch.setattr(trainer.measured, "open_model", lambda *_, **__: loaded.append(1))

    artifact = run(stop=stop)

    assert is_artifact(artifact)
    assert not loaded
    assert "stopped before the artifact was measured" in caplog.text


def test_an_interruption_leaves_a_whole_artifact(run, monkeypatch, tmp_path):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.measured, "record", interrupt)

    with pytest.raises(KeyboardInterrupt):
        run()

    assert not evaluations_of(tmp_path / "out" / "refined")
    monkeypatch.undo()
    assert evaluations_of(run(resume=True))


def test_an_artifact_made_of_the_adapter_has_the_numbers_unless_it_is_scaled(run, tmp_path):
    artifact = run()

    def merged(name, *more):
        words = ["--adapter", artifact / "adapter", "--output", tmp_path / name, *more]
        assert merge([str(word) for word in words]) == 0
        return tmp_path / name

    same, scaled = merged("same"), merged("scaled", "--scale", "0.5")
    assert load_artifact(same).manifest == load_artifact(artifact).manifest
    assert (same / "README.md").read_text() == (artifact / "README.md").read_text()
    assert not evaluations_of(scaled)
    assert END in (scaled / "README.md").read_text()  # above the note that says of what they are
