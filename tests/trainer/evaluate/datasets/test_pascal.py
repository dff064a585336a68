import pytest

from tests.trainer.evaluate.datasets.trees import (
    context,
    voc,
    write_image,
    write_label,
    write_lines,
)
from trainer.evaluate.datasets import DatasetError, open_segmentation


def first_values(dataset):
    return dataset.read_label(dataset.val[0]).flatten()[:4].tolist()


def names(samples):
    return [sample.name for sample in samples]


def augment(year, *names):
    """Labels of SBD for the names, with an image where VOC's own part has none."""
    for name in names:
        write_image(year / "JPEGImages" / f"{name}.jpg")
        write_label(year / "SegmentationClassAug" / f"{name}.png", (0, 5))


@pytest.mark.parametrize("below", ["VOCdevkit", "."])
def test_voc_is_found_in_the_devkit_and_above_it(tmp_path, below):
    voc(tmp_path / below)

    dataset = open_segmentation(tmp_path)

    assert (dataset.name, dataset.layout) == ("Pascal VOC 2012", "voc")
    assert dataset.background == 0
    assert names(dataset.train) == ["2007_000032"]
    assert names(dataset.val) == ["2007_000033"]
    assert first_values(dataset) == [0, 1, 20, 255]


def test_voc_trains_on_what_sbd_labels_and_scores_on_its_own(tmp_path):
    year = voc(tmp_path)
    augment(year, "2008_000009", "2007_000032", "2007_000033")
    write_lines(
        year / "ImageSets" / "Segmentation" / "trainaug.txt",
        "/JPEGImages/2008_000009.jpg /SegmentationClassAug/2008_000009.png",
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png",
    )

    dataset = open_segmentation(year)

    assert names(dataset.train) == ["2007_000032", "2008_000009"]
    folders = [sample.target.parent.name for sample in (*dataset.train, *dataset.val)]
    assert folders == ["SegmentationClass", "SegmentationClassAug", "SegmentationClass"]


def test_voc_takes_a_list_of_what_sbd_adds(tmp_path):
    year = voc(tmp_path)
    augment(year, "2008_000009")
    write_lines(year / "ImageSets" / "Segmentation" / "aug.txt", "2008_000009")

    assert names(open_segmentation(year).train) == ["2007_000032", "2008_000009"]


def test_labels_of_sbd_without_a_list_are_refused(tmp_path):
    year = voc(tmp_path)
    augment(year, "2008_000009")

    with pytest.raises(DatasetError, match=r"neither .*trainaug\.txt nor aug\.txt beside it"):
        open_segmentation(year)


def test_voc20_ignores_the_background(tmp_path):
    dataset = open_segmentation(voc(tmp_path), "voc20")

    assert (len(dataset.classes), dataset.classes[0]) == (20, "aeroplane")
    assert dataset.background is None
    assert first_values(dataset) == [255, 0, 19, 255]


def test_voc21_keeps_the_background_and_needs_no_training_part(tmp_path):
    year = voc(tmp_path)
    (year / "ImageSets" / "Segmentation" / "train.txt").unlink()

    dataset = open_segmentation(year, "voc21")

    assert (len(dataset.classes), dataset.background) == (21, 0)
    assert dataset.train == ()
    assert first_values(dataset) == [0, 1, 20, 255]


def test_context60_keeps_the_background(tmp_path):
    dataset = open_segmentation(context(tmp_path).parent, "context60")

    assert (len(dataset.classes), dataset.background) == (60, 0)
    assert (dataset.classes[1], dataset.classes[59]) == ("aeroplane", "wood")
    assert len(dataset.train) == 1
    assert first_values(dataset) == [0, 1, 59, 59]


def test_context59_ignores_the_background(tmp_path):
    dataset = open_segmentation(context(tmp_path), "context59")

    assert (len(dataset.classes), dataset.background) == (59, None)
    assert first_values(dataset) == [255, 0, 58, 58]


def test_a_list_with_an_image_that_does_not_exist_is_refused(tmp_path):
    year = voc(tmp_path)
    path = write_lines(
        year / "ImageSets" / "Segmentation" / "val.txt", "2007_000033", "2007_9", "2007_8"
    )

    with pytest.raises(DatasetError, match=rf"2 of 3 images that {path} lists .*2007_8\.jpg"):
        open_segmentation(year)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"train\.txt is missing; it lists the samples"),
        ([], r"train\.txt is empty"),
        (["2007_000032", "", "2007_000032"], r"train\.txt lists '2007_000032' twice"),
        (["2007_000033\x00"], r"do not exist"),
    ],
)
def test_an_unusable_list_is_refused(tmp_path, lines, message):
    year = voc(tmp_path)
    path = year / "ImageSets" / "Segmentation" / "train.txt"
    path.unlink()
    if lines is not None:
        write_lines(path, *lines)

    with pytest.raises(DatasetError, match=message):
        open_segmentation(year)


def test_a_list_that_is_no_text_is_refused(tmp_path):
    year = voc(tmp_path)
    (year / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(DatasetError, match=r"train\.txt cannot be read as a list"):
        open_segmentation(year)


def test_a_listed_image_without_a_label_is_named(tmp_path):
    year = voc(tmp_path)
    (year / "SegmentationClass" / "2007_000033.png").unlink()

    with pytest.raises(DatasetError, match=r"1 of 1 images .*SegmentationClass/2007_000033\.png"):
        open_segmentation(year)
