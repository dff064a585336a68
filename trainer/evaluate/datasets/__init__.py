"""Readers of labelled data sets, in the folders in which they are published.

dataset = open_segmentation(Path("data/ADEChallengeData2016"))  # or open_depth(...)
dataset.read_label(dataset.val[0])                              # uint8 [H, W], 255 = ignore

Opening lists files and reads no pixels; a label or a depth map is checked when it is read.
"""

from trainer.evaluate.datasets.layouts import (
    DEPTH_LAYOUTS,
    SEGMENTATION_LAYOUTS,
    open_depth,
    open_segmentation,
)
from trainer.evaluate.datasets.listing import IMAGE_SUFFIXES
from trainer.evaluate.datasets.samples import IGNORE, DatasetError, Sample
from trainer.evaluate.datasets.types import DepthDataset, SegmentationDataset

__all__ = [
    "DEPTH_LAYOUTS",
    "IGNORE",
    "IMAGE_SUFFIXES",
    "SEGMENTATION_LAYOUTS",
    "DatasetError",
    "DepthDataset",
    "Sample",
    "SegmentationDataset",
    "open_depth",
    "open_segmentation",
]
