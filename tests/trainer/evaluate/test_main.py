import json

import numpy as np
import pytest
from PIL import Image

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
