from dataclasses import replace

import pytest
import torch

from trainer.checkpoint import (
    Checkpoint,
    check_same_run,
    fit_batches,
    load_checkpoint,
    save_checkpoint,
)
from trainer.errors import CheckpointError
from trainer.recipe_file import load_recipe

CHECKPOINT = Checkpoint(
    step=3,
    position=12,
    parameters={"a": torch.arange(3.0)},
    optimizer={"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}]},
    generator=torch.Generator().get_state(),
    channels=[4, 2],
    bad_images=["x.jpg"],
    seconds=1.5,
    recipe={"loss": {"temperature": 0.2}, "run": {"seed": 0}},
    data="d",
    weights="w",
    global_batch=8,
    forward_batch=4,
)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "checkpoint.pt"

    save_checkpoint(path, CHECKPOINT)
    loaded = load_checkpoint(path)

    assert torch.equal(loaded.parameters["a"], CHECKPOINT.parameters["a"])
    assert torch.equal(loaded.generator, CHECKPOINT.generator)
    for name in ("step", "position", "optimizer", "channels", "bad_images", "seconds", "recipe"):
        assert getattr(loaded, name) == getattr(CHECKPOINT, name)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, CHECKPOINT)

    def save_half(_content, file):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, replace(CHECKPOINT, step=4))

    assert load_checkpoint(path).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [{"format": 1}, {"step": 1}, [1], {"format": 2, "step": 1}])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)

    with pytest.raises(CheckpointError, match="format|not a checkpoint"):
        load_checkpoint(path)


def test_damage_is_refused_with_the_path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"rubbish")

    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_continues_the_same_run_only():
    same = {"recipe": CHECKPOINT.recipe, "data": "d", "weights": "w"}
    check_same_run(CHECKPOINT, **same)

    other = {"loss": {"temperature": 0.3}, "run": {"seed": 1}}
    with pytest.raises(CheckpointError, match="other values of loss.temperature, run.seed"):
        check_same_run(CHECKPOINT, **same | {"recipe": other})
    for name in ("data", "weights"):
        with pytest.raises(CheckpointError, match="are not those"):
            check_same_run(CHECKPOINT, **same | {name: "other"})


def recipe_of(batch_size, accumulate=1):
    settings = [f"data.batch_size={batch_size}", f"data.accumulate={accumulate}"]
    return load_recipe("paper", settings)


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate", "warns"),
    [(1, 4, 2, False), (2, 2, 2, False), (2, 4, 1, True), (4, 1, 2, False), (1, 8, 1, True)],
)
def test_with_other_processes_a_step_takes_as_many_images(
    processes, batch_size, accumulate, warns, caplog
):
    recipe = fit_batches(recipe_of(batch_size), CHECKPOINT, num_processes=processes)

    assert recipe.data.accumulate == accumulate
    assert recipe.global_batch * processes == CHECKPOINT.global_batch
    assert ("statistics over a batch are of" in caplog.text) == warns


@pytest.mark.parametrize(
    ("processes", "batch_size", "cure"),
    [
        (3, 4, "not divide it; start 1 or 2 processes$"),
        (4, 4, "start 1 or 2 processes or set data.batch_size to 1 or 2$"),
        (1, 3, "not divide it; set data.batch_size to 1 or 2 or 4 or 8$"),
        (3, 5, "not divide it; start one process, and set data.batch_size to a divisor of 8$"),
    ],
)
def test_processes_that_cannot_take_as_many_images_are_told_what_would_fit(
    processes, batch_size, cure
):
    with pytest.raises(CheckpointError, match=cure):
        fit_batches(recipe_of(batch_size), CHECKPOINT, num_processes=processes)
