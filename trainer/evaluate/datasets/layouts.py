"""All layouts by name, and opening a folder as one of them."""

from pathlib import Path

from trainer.evaluate.datasets import coco, folder, nyu, pascal, scenes
from trainer.evaluate.datasets.layout import Layout, open_as
from trainer.evaluate.datasets.types import DepthDataset, SegmentationDataset

_SEGMENTATION: dict[str, Layout[SegmentationDataset]] = {
    "folder": folder.FOLDER,
    "ade20k": scenes.ADE20K,
    "cityscapes": scenes.CITYSCAPES,
    "camvid": scenes.CAMVID,
    "camvid-test": scenes.CAMVID_TEST,
    "voc": pascal.VOC,
    "voc20": pascal.VOC20,
    "voc21": pascal.VOC21,
    "context59": pascal.CONTEXT59,
    "context60": pascal.CONTEXT60,
    "coco-stuff": coco.COCO_STUFF,
    "coco-object": coco.COCO_OBJECT,
}
_DEPTH: dict[str, Layout[DepthDataset]] = {"folder": folder.DEPTH_FOLDER, "nyu": nyu.NYU}

# Name to a line for `--help`; the order is the one to show.
SEGMENTATION_LAYOUTS = {name: layout.about for name, layout in _SEGMENTATION.items()}
DEPTH_LAYOUTS = {name: layout.about for name, layout in _DEPTH.items()}


def open_segmentation(folder: Path, layout: str = "auto") -> SegmentationDataset:
    """List a data set with class numbers; pixels are read later.

    Args:
        folder: The one that holds it, or the one above.
        layout: A key of `SEGMENTATION_LAYOUTS`, or "auto" for the one that fits.

    Raises:
        DatasetError: No layout fits, several do, or files are missing.
    """
    return open_as(folder, layout, _SEGMENTATION)


def open_depth(folder: Path, layout: str = "auto") -> DepthDataset:
    """List a data set with distances; as `open_segmentation`, with `DEPTH_LAYOUTS`."""
    return open_as(folder, layout, _DEPTH)
