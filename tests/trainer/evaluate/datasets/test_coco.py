import pytest

from tests.trainer.evaluate.datasets.trees import coco, write_image
from trainer.evaluate.datasets import DatasetError, open_segmentation


def first_values(dataset):
    return dataset.read_label(dataset.val[0]).flatten()[:3].tolist()


def test_coco_stuff_has_171_classes_and_no_background(tmp_path):
    coco(tmp_path / "coco_stuff164k", "labelTrainIds", (0, 170, 255))

    dataset = open_segmentation(tmp_path)

    assert (dataset.name, dataset.layout) == ("COCO-Stuff", "coco-stuff")
    assert (len(dataset.classes), dataset.background) == (171, None)
    assert [dataset.classes[number] for number in (0, 79, 80, 170)] == [
        "person",
        "toothbrush",
        "banner",
        "wood",
    ]
    assert (dataset.train, len(dataset.val)) == ((), 1)
    assert first_values(dataset) == [0, 170, 255]


def test_coco_object_has_background_and_80_classes(tmp_path):
    coco(tmp_path, "instanceTrainIds", (0, 1, 80))

    dataset = open_segmentation(tmp_path)

    assert (dataset.name, dataset.layout) == ("COCO-Object", "coco-object")
    assert (len(dataset.classes), dataset.background) == (81, 0)
    assert (dataset.classes[1], dataset.classes[80]) == ("person", "toothbrush")
    assert first_values(dataset) == [0, 1, 80]


def test_a_folder_with_both_kinds_of_labels_must_be_named(tmp_path):
    coco(tmp_path, "labelTrainIds", (0,))
    coco(tmp_path, "instanceTrainIds", (0,))

    with pytest.raises(DatasetError, match="fits the layouts coco-stuff, coco-object; name the"):
        open_segmentation(tmp_path)
    assert open_segmentation(tmp_path, "coco-object").layout == "coco-object"


def test_the_training_part_is_listed_where_it_has_labels(tmp_path):
    coco(tmp_path, "labelTrainIds", (0,))
    coco(tmp_path, "labelTrainIds", (0,), part="train2017")

    assert len(open_segmentation(tmp_path).train) == 1


def test_an_image_without_a_label_is_named(tmp_path):
    coco(tmp_path, "labelTrainIds", (0,))
    write_image(tmp_path / "images" / "val2017" / "000000000285.jpg")

    with pytest.raises(DatasetError, match=r"1 of 2 images .*000000000285_labelTrainIds\.png"):
        open_segmentation(tmp_path)
