import json

import numpy as np
import pytest
from PIL import Image

from tests.support import noise_image, tiny_artifact
from trainer.evaluate.__main__ import main


@pytest.fixture
def data(tmp_path):
    """Four images a part, left half dark and right half bright or the other way round."""
    folder = tmp_path / "data"
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True)
        for index in range(4):
            label = np.zeros((64, 64), dtype=np.uint8)
            label[:, 32 * (index % 2) :][:, :32] = 1
            image = np.repeat(label[..., None] * 200, 3, axis=2)
            Image.fromarray(image).save(folder / part / "images" / f"{index}.png")
            Image.fromarray(label).save(folder / part / "labels" / f"{index}.png")
    (folder / "classes.json").write_text(json.dumps({"0": "dark", "1": "bright"}))
    return folder


def test_segmentation_prints_and_writes_scores(data, tmp_path, capsys):
    report = tmp_path / "report.json"

    status = main(
        ["segmentation", "--model", "vit_tiny_patch16_224", "--random-weights", "--data", str(data)]
        + ["--size", "32", "64", "--seeds", "2", "--json", str(report)]
    )

    assert status == 0
    assert capsys.readouterr().out.startswith("data at 32x64: mIoU ")
    results = json.loads(report.read_text())["results"]
    assert [result["size"] for result in results] == [[32, 64], [32, 64]]
    assert len(results[0]["probe"]["scores"]["class_iou"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_tinny", "--random-weights"], "did you mean"),
        (["--model", "no/such/folder"], "no config.json"),
        (["--model", "vit_tiny_patch16_224", "--random-weights", "--size", "30", "64"], "32x64"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(data, arguments, message, caplog):
    status = main(["segmentation", "--data", str(data), *arguments])

    assert status == 2
    assert message in caplog.text


def test_a_folder_without_labels_is_refused(tmp_path, caplog):
    arguments = ["--model", "vit_tiny_patch16_224", "--random-weights", "--data", str(tmp_path)]

    assert main(["segmentation", *arguments]) == 2
    assert "classes.json is missing" in caplog.text


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed in range(3):
        noise_image(40, 60, seed).save(folder / f"{seed}.png")
    return folder


def test_spurious_compares_a_refined_backbone_with_its_raw_one(photographs, tmp_path, capsys):
    refined, raw = (tiny_artifact(tmp_path / name, seed) for seed, name in enumerate("ab"))
    report = tmp_path / "report.json"

    status = main(
        ["spurious", "--model", str(refined), "--baseline", str(raw), "--images", str(photographs)]
        + ["--num-images", "2", "--sigma", "0.5", "--attention-layers", "0", "1"]
        + ["--json", str(report)]
    )

    assert status == 0
    assert capsys.readouterr().out.startswith("2 images at 64 px; cosine thresholds FP ")
    content = json.loads(report.read_text())
    assert list(content["shares"]) == ["raw", "refined, raw patterns", "refined, own patterns"]
    assert all(0 <= share["fp_gp"] <= 1 for share in content["shares"].values())
    assert content["shares"]["raw"]["hijacked"] > 0


def test_spurious_counts_one_backbone_alone(photographs, capsys):
    status = main(
        ["spurious", "--model", "vit_tiny_patch16_224", "--images", str(photographs)]
        + ["--random-weights", "--size", "32", "--threshold", "0.9"]
    )

    assert status == 0
    assert "cosine thresholds FP 0.900, GP 0.900" in capsys.readouterr().out


def test_spurious_refuses_a_folder_without_images(tmp_path, caplog):
    arguments = ["--model", "vit_tiny_patch16_224", "--random-weights", "--images", str(tmp_path)]

    assert main(["spurious", *arguments]) == 2
    assert "no images under" in caplog.text


def test_spurious_refuses_layers_that_do_not_exist(photographs, caplog):
    arguments = ["--model", "vit_tiny_patch16_224", "--random-weights", "--size", "32"]
    arguments += ["--images", str(photographs), "--attention-layers", "3", "12"]

    assert main(["spurious", *arguments]) == 2
    assert "layer 12 does not exist" in caplog.text
