import json

import pytest
from PIL import Image

from tests.support import noise_image
from trainer.evaluate.zeroshot import ZeroshotError
from trainer.evaluate.zeroshot.jobs import Job, plan_jobs


@pytest.fixture
def data(tmp_path):
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / part / kind).mkdir(parents=True)
        noise_image(4, 4).save(tmp_path / part / "images" / "a.png")
        Image.new("L", (4, 4)).save(tmp_path / part / "labels" / "a.png")
    (tmp_path / "classes.json").write_text(json.dumps({"0": "cat", "1": "dog"}))
    return tmp_path


def test_choices_of_a_layout_go_before_those_of_all(data):
    names = data / "names.txt"
    names.write_text("kitten\npuppy\n")

    (job,) = plan_jobs(
        [f"folder={data}"],
        class_names=[str(data / "none.txt"), f"folder={names}"],
        short_sides=["336", "folder=560"],
    )

    assert job.vocabulary.names == ("kitten", "puppy")
    assert job.asked_side == 560
    assert job.threshold is None


def test_a_folder_may_have_an_equals_sign(data):
    folder = data / "a=b"
    folder.mkdir()
    for path in ("train", "val", "classes.json"):
        (data / path).rename(folder / path)

    (job,) = plan_jobs([str(folder)], "folder")

    assert job.dataset.name == "a=b"


@pytest.mark.parametrize(
    ("layout", "asked", "native", "side"),
    [
        ("voc21", None, 224, 336),
        ("voc21", None, 448, 448),
        ("cityscapes", None, 224, 560),
        ("cityscapes", 448, 512, 448),
    ],
)
def test_the_short_side_is_the_usual_one_and_not_below_the_models(
    data, layout, asked, native, side
):
    (job,) = plan_jobs([str(data)], "folder")
    object.__setattr__(job.dataset, "layout", layout)

    assert Job(*job[:3], asked).short_side((native, native)) == side


def test_a_threshold_needs_a_background(data):
    with pytest.raises(ZeroshotError, match="no data set has such a class"):
        plan_jobs([str(data)], "folder", threshold=0.5)


def test_a_data_set_is_given_once(data):
    with pytest.raises(ZeroshotError, match="twice"):
        plan_jobs([str(data), f"folder={data}"], "folder")
