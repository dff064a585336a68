import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone import RegisterBorder, save_artifact
from tests.support import tiny_artifact, tiny_backbone
from trainer.evaluate.__main__ import main
from trainer.evaluate.results import read

SHORT = ["--device", "cpu", "--precision", "fp32", "--steps", "20", "--learning-rates", "0.01"]


def write_data(folder, kind, targets):
    """Four images a part, left half dark and right half bright or the other way round."""
    for number, part in enumerate(("train", "val")):
        for name in ("images", kind):
            (folder / part / name).mkdir(parents=True)
        for index in range(4):
            side = np.zeros((64, 64), dtype=np.uint8)
            side[:, 32 * (index % 2) :][:, :32] = 1
            image = np.repeat(side[..., None] * (200 - 8 * index - number), 3, axis=2)
            Image.fromarray(image).save(folder / part / "images" / f"{index}.png")
            Image.fromarray(targets(side)).save(folder / part / kind / f"{index}.png")
    return folder


@pytest.fixture
def data(tmp_path):
    folder = write_data(tmp_path / "data", "labels", lambda side: side)
    (folder / "classes.json").write_text(json.dumps({"0": "dark", "1": "bright"}))
    return folder


@pytest.fixture
def depths(tmp_path):
    """Dark is one metre away, bright two."""
    return write_data(
        tmp_path / "depths", "depth", lambda side: 1000 + 1000 * side.astype("uint16")
    )


def raw_backbone(folder, **changes):
    """A tiny backbone in timm's format."""
    save_artifact(folder, tiny_backbone(**changes), border=RegisterBorder(), model_card="")
    (folder / "refinery.json").unlink()
    return str(folder)


@pytest.fixture
def models(tmp_path):
    """Arguments that name a refined backbone and a raw one, and where features go."""
    refined, raw = str(tiny_artifact(tmp_path / "a")), raw_backbone(tmp_path / "b", seed=1)
    return ["--model", refined, "--baseline", raw, "--features", str(tmp_path / "features"), *SHORT]


def test_segmentation_puts_both_side_by_side_and_writes_them(data, models, tmp_path, capsys):
    json_path, markdown_path = tmp_path / "result.json", tmp_path / "result.md"

    status = main(
        ["segmentation", "--data", str(data), *models, "--size", "32", "64", "--seeds", "2"]
        + ["--classes", "--json", str(json_path), "--markdown", str(markdown_path)]
    )

    assert status == 0
    shown = capsys.readouterr().out
    assert "mIoU (%)" in shown
    assert "refined minus raw" in shown
    assert "±" in shown
    assert "| bright " in shown
    result = read(json_path)
    assert [row.subject for row in result.rows] == ["raw", "refined", "refined minus raw"]
    assert len(result.rows[0].scores[0].values) == 2
    assert "mIoU" in markdown_path.read_text()


def test_a_second_run_finds_the_features_of_the_first(data, models, caplog):
    caplog.set_level("INFO")
    command = ["segmentation", "--data", str(data), *models, "--size", "32", "64", "--seeds", "1"]
    main(command)
    assert "4 images, 4 computed" in caplog.text
    caplog.clear()

    assert main(command) == 0

    assert "4 images, 0 computed" in caplog.text
    assert "4 images, 4 computed" not in caplog.text


def test_depth_puts_both_side_by_side(depths, models, capsys):
    status = main(["depth", "--data", str(depths), *models, "--short-side", "32", "--seeds", "2"])

    assert status == 0
    shown = capsys.readouterr().out
    assert "RMSE" in shown
    assert "refined minus raw" in shown


def test_a_recorded_result_is_in_the_manifest(data, models, capsys):
    command = ["segmentation", "--data", str(data), *models, "--seeds", "1", "--record"]

    assert main(command) == 0

    assert "mIoU" in capsys.readouterr().out
    manifest = json.loads((Path(models[1]) / "refinery.json").read_text())
    assert [found["task"] for found in manifest["evaluations"]] == ["segmentation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_tinny", "--random-weights"], "did you mean"),
        (["--model", "no/such/folder"], "no config.json"),
        ([], "no --model was named"),
        (["--model", "vit_tiny_patch16_224", "--random-weights", "--size", "30", "64"], "32x64"),
        (
            ["--model", "vit_tiny_patch16_224", "--random-weights", "--window", "30", "16"],
            "window size 30 px is not a whole number of 16 px patches",
        ),
        (["--model", "vit_tiny_patch16_224", "--record"], "--record writes into an artifact"),
        (["--url", "http://x", "--record"], "leave --record out"),
        (["--url", "http://x", "--device", "cpu"], "--device is for models of this process"),
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--url", "http://x", "--api-key-file", "nothing"], "nothing cannot be read"),
        (["--model", "x", "--api-key-file", "x"], "--api-key-file is for --url"),
        (["--model", "x", "--json", "."], "is a folder; give the name of a file"),
        (["--model", "x", "--features", "README.md"], "is a file; give a folder, or none"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(data, arguments, message, caplog, capsys):
    status = main(["segmentation", "--data", str(data), *arguments])

    assert status == 2
    assert message in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["", "two words", "\n"])
def test_a_key_file_without_a_key_is_refused_and_not_shown(data, tmp_path, caplog, content):
    key = tmp_path / "key"
    key.write_text(content)
    command = ["segmentation", "--data", str(data), "--url", "http://127.0.0.1:9"]

    assert main([*command, "--api-key-file", str(key)]) == 2
    assert "has no key in its first line" in caplog.text
    assert "two words" not in caplog.text


def test_backbones_of_other_patch_sizes_each_have_patches_of_their_own(
    data, models, tmp_path, caplog, capsys
):
    models[3] = raw_backbone(tmp_path / "fine", patch_size=8)
    command = ["segmentation", "--data", str(data), *models, "--seeds", "1"]

    assert main([*command, "--size", "40", "64"]) == 2
    assert "40x64 px is not a whole number of refined's 16 px patches" in caplog.text
    assert main([*command, "--size", "32", "64"]) == 0
    assert "refined minus raw" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--steps", "-1"],
        ["--learning-rates", "0"],
        ["--size", "32", "32", "--short-side", "32"],
        ["--layout", "folders"],
    ],
)
def test_values_that_mean_nothing_are_refused_by_the_parser(data, arguments, capsys):
    with pytest.raises(SystemExit):
        main(["segmentation", "--data", str(data), "--model", "x", *arguments])

    assert "error: argument" in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(tmp_path, caplog):
    arguments = ["--model", "vit_tiny_patch16_224", "--random-weights", "--data", str(tmp_path)]

    assert main(["segmentation", *arguments]) == 2
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize("command", ["segmentation", "depth", "zeroshot", "spurious"])
def test_every_subcommand_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])

    assert stopped.value.code == 0
    assert "--baseline" in capsys.readouterr().out
