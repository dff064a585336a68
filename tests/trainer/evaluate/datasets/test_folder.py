import json

import pytest

from tests.support import data_folder
from tests.trainer.evaluate.datasets.trees import (
    depth_folder,
    segmentation_folder,
    write_depth,
    write_image,
)
from trainer.evaluate.datasets import DatasetError, open_depth, open_segmentation


def names(samples):
    return [sample.name for sample in samples]


def test_images_and_labels_of_both_parts_are_paired(tmp_path):
    dataset = open_segmentation(segmentation_folder(tmp_path / "streets"))

    assert (dataset.name, dataset.layout) == ("streets", "folder")
    assert dataset.classes == ("dark", "bright")
    assert dataset.background is None
    assert names(dataset.train) == ["a", "b", "c"]
    assert names(dataset.val) == ["d", "e"]
    assert dataset.val[0].target == tmp_path / "streets" / "val" / "labels" / "d.png"
    assert dataset.read_label(dataset.val[0]).unique().tolist() == [0, 1, 255]


def test_classes_are_in_the_order_of_their_numbers_and_background_is_known(tmp_path):
    classes = {str(number): f"class {number}" for number in reversed(range(12))}

    dataset = open_segmentation(segmentation_folder(tmp_path, classes | {"3": "background"}))

    assert dataset.classes[2:4] == ("class 2", "background")
    assert dataset.classes[11] == "class 11"
    assert dataset.background == 3


def test_a_missing_label_is_named(tmp_path):
    segmentation_folder(tmp_path)
    (tmp_path / "val" / "labels" / "e.png").unlink()

    with pytest.raises(DatasetError, match=r"1 of 2 images .* missing one is .*val/labels/e\.png"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_named(tmp_path, part):
    segmentation_folder(tmp_path)
    for image in (tmp_path / part / "images").iterdir():
        image.unlink()
    (tmp_path / part / "images" / "._a.jpg").touch()

    with pytest.raises(DatasetError, match=rf"no images in .*{part}/images; they end in \.jpg"):
        open_segmentation(tmp_path)


def test_two_images_of_one_label_are_refused(tmp_path):
    segmentation_folder(tmp_path)
    write_image(tmp_path / "val" / "images" / "d.png")

    with pytest.raises(DatasetError, match=r"d\.jpg and .*d\.png have the same label .*d\.png"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"classes\.json is missing"),
        ("{", "is not JSON"),
        ("[]", "must number its classes from 0, like"),
        ("{}", "must number its classes from 0, like"),
        ('{"0": "a", "2": "b"}', "without gaps; of 2 classes one is '2' and none is '1'"),
        ('{"1": "a", "2": "b"}', "without gaps; of 2 classes one is '2' and none is '0'"),
        ('{"0": "a", "1": null}', "gives class 1 the name None; names are text"),
        (json.dumps({str(number): "a" for number in range(256)}), "names 256 classes; .* 255"),
    ],
)
def test_unusable_class_names_are_refused(tmp_path, content, message):
    segmentation_folder(tmp_path)
    (tmp_path / "classes.json").unlink()
    if content is not None:
        (tmp_path / "classes.json").write_text(content)

    with pytest.raises(DatasetError, match=message):
        open_segmentation(tmp_path)


def test_depth_maps_may_be_images_or_arrays(tmp_path):
    depth_folder(tmp_path / "kitchen")
    (tmp_path / "kitchen" / "train" / "depth" / "b.png").rename(
        tmp_path / "kitchen" / "train" / "depth" / "b.npy"
    )

    dataset = open_depth(tmp_path / "kitchen")

    assert (dataset.name, dataset.layout) == ("kitchen", "folder")
    assert [sample.target.name for sample in dataset.train] == ["a.png", "b.npy"]
    assert (dataset.min_depth, dataset.max_depth) == (1e-3, 10)
    assert dataset.eval_mask(4, 6) is None
    assert dataset.read_depth(dataset.val[0]).flatten()[:2].tolist() == [0, 1.5]


def test_a_description_says_scale_and_range(tmp_path):
    depth_folder(tmp_path)
    write_depth(tmp_path / "val" / "depth" / "c.png", 512)
    (tmp_path / "depth.json").write_text('{"scale": 256, "min": 0.5, "max": 80}')

    dataset = open_depth(tmp_path)

    assert (dataset.min_depth, dataset.max_depth) == (0.5, 80)
    assert dataset.read_depth(dataset.val[0]).unique().tolist() == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"depth\.json: Invalid JSON"),
        ('{"Scale": 1}', r"depth\.json: Scale: .*; it may set scale \(units per metre\)"),
        ('{"scale": 0}', r"depth\.json: scale: .* greater than 0"),
        ('{"scale": "1000"}', r"depth\.json: scale: .* valid number"),
        ('{"min": 2, "max": 1}', r"depth\.json: .*min 2 is not below max 1"),
    ],
)
def test_an_unusable_description_is_refused(tmp_path, content, message):
    depth_folder(tmp_path)
    (tmp_path / "depth.json").write_text(content)

    with pytest.raises(DatasetError, match=message):
        open_depth(tmp_path)


def test_a_missing_depth_map_is_named(tmp_path):
    depth_folder(tmp_path)
    (tmp_path / "train" / "depth" / "a.png").unlink()

    with pytest.raises(DatasetError, match=r"1 of 2 images .* have no depth map; .*depth/a\.png"):
        open_depth(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "num_train", "num_val", "num_classes"),
    [("seg/camvid", 367, 101, 11), ("seg/voc2012_subset", 324, 100, 21)],
)
def test_real_labels_are_read(folder, num_train, num_val, num_classes):
    dataset = open_segmentation(data_folder(folder))

    assert (len(dataset.train), len(dataset.val)) == (num_train, num_val)
    assert len(dataset.classes) == num_classes
    assert len(dataset.read_label(dataset.val[0]).unique()) > 1


@pytest.mark.data
def test_real_depth_is_read():
    dataset = open_depth(data_folder("depth/7scenes_redkitchen"))

    assert (len(dataset.train), len(dataset.val)) == (55, 16)
    depth_HW = dataset.read_depth(dataset.val[0])
    assert depth_HW.shape == (480, 640)
    assert 0.5 < depth_HW[depth_HW > 0].median() < dataset.max_depth
