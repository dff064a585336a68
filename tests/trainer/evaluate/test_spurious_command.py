"""python -m trainer.evaluate spurious"""

import json
import shutil

import pytest

from backbone import load_artifact
from tests.support import noise_image, tiny_artifact
from tests.trainer.refining import model_folder
from trainer.evaluate.__main__ import main
from trainer.evaluate.record import recorded
from trainer.evaluate.results import read


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed in range(3):
        noise_image(40, 60, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def models(tmp_path):
    refined, raw = tiny_artifact(tmp_path / "new"), model_folder(tmp_path / "old", seed=1)
    return ["--model", str(refined), "--baseline", str(raw), "--device", "cpu"]


RANDOM = ["--model", "vit_tiny_patch16_224", "--random-weights", "--baseline", "none"]
RANDOM += ["--device", "cpu", "--size", "32"]


def spurious(photographs, *arguments):
    return main(["spurious", "--images", str(photographs), *arguments])


def test_a_refined_backbone_stands_beside_its_raw_one(photographs, models, tmp_path, capsys):
    files = [tmp_path / "out" / name for name in ("result.json", "result.md")]
    arguments = ["--num-images", "2", "--sigma", "0.5", "--attention-layers", "0", "1"]
    arguments += ["--by-layer", "--record", "--json", str(files[0]), "--markdown", str(files[1])]

    assert spurious(photographs, *models, *arguments) == 0

    shown = capsys.readouterr().out
    assert "| AH (%)" in shown
    assert "| block" in shown
    footer = shown.splitlines()[-1]
    assert footer.startswith("2 images used, 0 skipped; intervals: 95 %, bootstrap over images. ")
    assert "Higher is better: clean, view margin" in footer
    result = read(files[0])
    assert [row.subject for row in result.rows] == ["raw", "refined", "refined minus raw"]
    assert result.dataset == "photographs"
    assert (result.settings["images"], result.settings["size"]) == (2, [64, 64])
    assert len(result.rows[0].scores[0].values) == 2
    text = files[1].read_text()
    assert "| AH (%)" in text
    assert "| block" in text
    artifact = tmp_path / "new"
    assert len(recorded(load_artifact(artifact).manifest.evaluations)) == 1
    assert "| AH (%)" in (artifact / "README.md").read_text()


def test_one_backbone_alone_and_no_attention_unless_asked_for(photographs, capsys):
    assert spurious(photographs, *RANDOM, "--threshold", "0.9") == 0

    shown = capsys.readouterr().out
    assert "| FP or GP (%)" in shown
    assert "AH" not in shown
    assert "own" not in shown


def test_an_unreadable_image_stops_it_or_is_skipped(photographs, tmp_path, caplog, capsys):
    (photographs / "1.png").write_bytes(b"nothing")
    result = tmp_path / "result.json"

    stopped = spurious(photographs, *RANDOM)
    message = caplog.text
    skipped = spurious(photographs, *RANDOM, "--skip-bad-images", "--json", str(result))

    assert (stopped, skipped) == (2, 0)
    assert "unreadable image" in message
    assert "--skip-bad-images" in message
    assert json.loads(result.read_text())["settings"]["images"] == 2
    assert "skipped unreadable image" in caplog.text
    assert "2 images used, 1 skipped;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attention-layers", "3", "12"], "layer 12 does not exist"),
        (["--attention-layers", "5", "4"], "the first comes after the last"),
        (["--size", "30"], "not a whole number of"),
        (["--reference", "/no/such.png"], "the reference image /no/such.png cannot be read"),
        (["--record"], "vit_tiny_patch16_224 is none"),
        (["--baseline", "vit_tinny"], "vit_tinny"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(photographs, caplog, more, message):
    assert spurious(photographs, *RANDOM, *more) == 2
    assert message in caplog.text


def test_a_folder_without_images_is_refused(photographs, caplog):
    shutil.rmtree(photographs)
    photographs.mkdir()

    assert spurious(photographs, *RANDOM) == 2
    assert "no images under" in caplog.text
