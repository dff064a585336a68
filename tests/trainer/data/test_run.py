"""Whole runs on other sources than a folder, and with several sizes."""

import pytest
import torch
from rich.console import Console

from backbone import load_artifact
from tests.trainer.refining import SIZE, image_folder, model_folder, small_recipe, write_shard
from trainer.data import ImageFolder
from trainer.errors import DataError
from trainer.loop import Interrupted, Loop, StopRequest
from trainer.record import read_metrics
from trainer.refiner import Refiner
from trainer.run import refine

LOSSES = ("loss", "refinement", "absorption", "grad_norm")


def run(images, output, model, *settings, stop=None, **changes):
    """The losses of a run's steps."""
    refine(
        small_recipe(f"backbone.name={model}", *settings),
        images,
        output,
        device=torch.device("cpu"),
        stop=stop or StopRequest(),
        console=Console(quiet=True),
        **changes,
    )
    return [[record[name] for name in LOSSES] for record in read_metrics(output)]


def test_a_run_on_shards_takes_the_steps_of_one_on_their_files(tmp_path):
    model = model_folder(tmp_path / "model")
    folder = image_folder(tmp_path / "images", count=6)
    for number, path in enumerate(sorted(folder.iterdir())):
        write_shard(tmp_path / f"shard-{number}.tar", {path.name: path.read_bytes()})
    settings = ["run.max_steps=2", "channels.max_channels=1"]

    on_shards = run(tmp_path / "shard-{0..5}.tar", tmp_path / "a", model, *settings)

    assert on_shards == run(folder, tmp_path / "b", model, *settings)
    assert load_artifact(tmp_path / "a" / "refined").manifest.data["images"] == 6


def test_a_run_with_several_sizes_resumes_and_is_served_at_the_first(tmp_path, monkeypatch):
    model = model_folder(tmp_path / "model")
    folder = image_folder(tmp_path / "images", count=6)
    settings = ["data.other_sizes=[48]", "run.max_steps=4"]
    stop, step, sides = StopRequest(), Loop._step, []
    forward = Refiner.forward

    def stop_after_two(loop, stream):
        values = step(loop, stream)
        stop.signum = 15 if loop.progress.step == 2 else None
        return values

    def note_side(refiner, images, draws):
        sides.append(images.shape[-1])
        return forward(refiner, images, draws)

    monkeypatch.setattr(Refiner, "forward", note_side)
    whole = run(folder, tmp_path / "a", model, *settings)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop_after_two)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "b", model, *settings, stop=stop)

    assert run(folder, tmp_path / "b", model, *settings, resume=True) == whole
    assert set(sides) == {48, SIZE}
    assert sides[:4] == sides[4:]
    assert load_artifact(tmp_path / "b" / "refined").manifest.native_size == (SIZE, SIZE)


def test_a_run_that_met_too_many_unreadable_images_resumes_with_more_allowed(tmp_path):
    model = model_folder(tmp_path / "model")
    folder = image_folder(tmp_path / "images", count=6)
    order = ImageFolder.scan(folder, seed=0, max_images=None).order(0, seed=0)
    for index in order[4:]:  # met in the third step
        (folder / f"00{index}.png").write_bytes(b"no image at all")
    settings = ["run.max_steps=4", "run.checkpoint_every=1"]
    with pytest.raises(DataError, match=r"2 of 6 images are unreadable"):
        run(folder, tmp_path / "out", model, *settings, skip_bad_images=True)

    settings.append("data.max_bad_share=0.5")
    run(folder, tmp_path / "out", model, *settings, skip_bad_images=True, resume=True)

    assert [record["step"] for record in read_metrics(tmp_path / "out")] == [1, 2, 3, 4]
    assert load_artifact(tmp_path / "out" / "refined").manifest.data["skipped"] == 2
