import builtins
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.evaluate.datasets.trees import (
    ade20k,
    camvid,
    context,
    depth_folder,
    segmentation_folder,
    voc,
)
from trainer.evaluate.datasets import (
    DEPTH_LAYOUTS,
    SEGMENTATION_LAYOUTS,
    DatasetError,
    open_depth,
    open_segmentation,
)


def test_an_unknown_folder_is_told_what_every_layout_needs(tmp_path):
    with pytest.raises(DatasetError, match="no layout that is known") as caught:
        open_segmentation(tmp_path)

    message = str(caught.value)
    assert "\n  folder: classes.json" in message
    assert "\n  ade20k: images/validation and annotations/validation (here or in ADE" in message
    assert "\n  coco-object: images/val2017 and annotations/val2017/*_instanceTrainIds" in message


def test_a_layout_that_was_named_is_told_what_it_needs(tmp_path):
    camvid(tmp_path)

    with pytest.raises(DatasetError, match="is not laid out as cityscapes; looked for leftImg8bit"):
        open_segmentation(tmp_path, "cityscapes")


def test_an_unknown_layout_is_told_the_known_ones(tmp_path):
    with pytest.raises(DatasetError, match="no layout 'ade'; choose auto, folder, ade20k"):
        open_segmentation(tmp_path, "ade")
    with pytest.raises(DatasetError, match="no layout 'kitti'; choose auto, folder, nyu"):
        open_depth(tmp_path, "kitti")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match="there is no folder .*/nowhere"):
        open_segmentation(tmp_path / "nowhere")


def test_context_must_be_named_with_or_without_background(tmp_path):
    context(tmp_path)

    with pytest.raises(DatasetError, match="fits the layouts context59, context60; name the one"):
        open_segmentation(tmp_path)


def test_two_data_sets_in_one_folder_must_be_named(tmp_path):
    ade20k(tmp_path / "ADEChallengeData2016")
    voc(tmp_path / "VOCdevkit")

    with pytest.raises(DatasetError, match="fits the layouts ade20k, voc"):
        open_segmentation(tmp_path)
    assert open_segmentation(tmp_path, "voc").layout == "voc"


def test_a_description_of_ones_own_decides(tmp_path):
    segmentation_folder(camvid(tmp_path))

    assert open_segmentation(tmp_path).layout == "folder"


def test_opening_reads_no_pixels(tmp_path, monkeypatch):
    segmentation, depth = segmentation_folder(tmp_path / "s"), depth_folder(tmp_path / "d")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    assert len(open_segmentation(segmentation).val) == 2
    assert len(open_depth(depth).val) == 1


@pytest.mark.parametrize("layouts", [SEGMENTATION_LAYOUTS, DEPTH_LAYOUTS])
def test_every_layout_is_described_in_one_line(layouts):
    assert all("\n" not in about and 20 < len(about) < 160 for about in layouts.values())


def test_paths_may_be_relative(tmp_path, monkeypatch):
    segmentation_folder(tmp_path / "streets")
    monkeypatch.chdir(tmp_path / "streets")

    dataset = open_segmentation(Path())

    assert dataset.name == "streets"
    assert dataset.read_label(dataset.val[0]).shape == (4, 6)
