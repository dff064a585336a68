"""`python -m trainer.evaluate zeroshot`, from checkpoint folders to the table."""

import json

import numpy as np
import pytest
from PIL import Image

from backbone import RegisterBorder, save_artifact
from tests.support import noise_image
from tests.trainer.evaluate.zeroshot import towers
from trainer.evaluate.__main__ import main
from trainer.evaluate.results import read

CLASSES = ("background", "cat", "diningtable")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP checkpoint, its raw and a refined vision tower, and two data sets."""
    root = tmp_path_factory.mktemp("zeroshot")
    towers.write_clip(root / "clip")
    backbone = towers.clip_backbone(root / "clip")
    save_artifact(root / "refined", backbone, border=RegisterBorder(seed=7), model_card="# tiny\n")
    for name in ("one", "two"):
        data = root / name
        for part in ("train", "val"):
            for kind in ("images", "labels"):
                (data / part / kind).mkdir(parents=True)
            for number in range(2):
                noise_image(70, 90, seed=number).save(data / part / "images" / f"{number}.png")
                labels = np.random.default_rng(number).integers(0, len(CLASSES), (70, 90))
                Image.fromarray(labels.astype(np.uint8)).save(
                    data / part / "labels" / f"{number}.png"
                )
        numbered = {str(number): name for number, name in enumerate(CLASSES)}
        (data / "classes.json").write_text(json.dumps(numbered))
    return root


def arguments(world, *more, model="refined", data=("one",)):
    given = ["zeroshot", "--model", str(world / model), "--text", str(world / "clip")]
    given += ["--device", "cpu", "--precision", "fp32", "--templates", "plain"]
    given += ["--text-cache", str(world / "text"), "--baseline", "none"]
    for name in data:
        given += ["--data", f"folder={world / name}"]
    return [*given, *more]


def test_a_data_set_is_measured_and_written(world, tmp_path, capsys):
    more = ["--json", str(tmp_path / "z.json"), "--markdown", str(tmp_path / "z.md"), "--classes"]

    assert main(arguments(world, *more)) == 0

    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert "diningtable" in printed
    result = read(tmp_path / "z.json")
    assert result.rows[0].subject == "refined"
    assert result.settings["background"] == "names"
    assert result.settings["window"] == [64, 32]  # the model's own side, and half of it
    assert result.settings["size"] == "short side 336"
    assert result.settings["path"] == "attention"
    assert "mIoU" in (tmp_path / "z.md").read_text()


def test_several_data_sets_make_a_table_with_their_mean(world, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("wall, floor\ncat, kitten\ntable\n")
    more = ["--json", str(tmp_path / "z.json"), "--short-side", "64", "--window", "0", "0"]
    more += ["--class-names", f"folder={tmp_path / 'names.txt'}", "--background", "threshold"]

    assert main(arguments(world, *more, data=("one", "two"))) == 0

    printed = capsys.readouterr().out
    assert printed.startswith("one, two\n")
    assert "mean (%)" in printed
    result = read(tmp_path / "z.json")
    assert [score.name for score in result.rows[0].scores] == ["one", "two", "mean"]
    assert result.settings["threshold"] == 0.1
    assert result.settings["names"] == 3  # the background's are not asked for
    assert result.settings["window"] == "none"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "leave --url out"),
        (["--short-side", "0"], "is not a number of pixels"),
        (["--short-side", "64", "--short-side", "32"], "given twice"),
        (["--threshold", "2"], "is no probability"),
        (["--scale", "0"], "--scale 0 is not a number above 0"),
        (["--templates", "no-such"], "templates 'no-such' are neither"),
        (["--class-names", "no-such.txt"], "class names no-such.txt cannot be read"),
        (["--short-side", "64", "--window", "50", "50"], "is not a whole number of 16 px"),
    ],
)
def test_what_cannot_be_done_is_said(world, more, message, caplog):
    assert main(arguments(world, *more)) == 2
    assert message in caplog.text


def test_a_backbone_of_another_tower_is_refused(world, tmp_path, caplog):
    towers.write_clip(tmp_path, seed=9)
    other = [*arguments(world)]
    other[other.index("--text") + 1] = str(tmp_path)

    assert main(other) == 2
    assert "--unrelated-towers" in caplog.text
    more = ["--unrelated-towers", "--short-side", "64"]
    assert main([*other, *more]) == 0
