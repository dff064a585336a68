"""What a labelled data set is once it is listed: samples by path, pixels read on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.evaluate.datasets.depths import read_metres
from trainer.evaluate.datasets.labels import read_classes
from trainer.evaluate.datasets.samples import IGNORE, DatasetError, Sample


@dataclass(frozen=True)
class SegmentationDataset:
    """A data set with a class number per pixel.

    Attributes:
        name: For people.
        layout: One of `SEGMENTATION_LAYOUTS`, never "auto".
        classes: Class names; the position is the class number.
        train: Samples to fit on, sorted by name; empty where a layout has only `val`.
        val: Samples to score on, sorted by name.
        class_of: Class number of each value that label files may hold, `IGNORE` for pixels that
            are not scored. None: values are class numbers, 255 is `IGNORE`.
        background: Class number that stands for everything else: 0 in VOC21, Context60 and
            COCO-Object. None: there is no such class; where the published labels have one, as in
            VOC20, Context59 and ADE20K, its pixels are ignored.
    """

    name: str
    layout: str
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    class_of: Mapping[int, int] | None = field(default=None, hash=False)
    background: int | None = None

    def read_label(self, sample: Sample) -> Tensor:
        """The label map at its own size, which is the image's; uint8 `[H, W]`, 255 = ignore.

        Raises:
            DatasetError: It cannot be read, is no map of class numbers, holds a value that the
                data set does not know, or differs from the image in size.
        """
        class_of = self.class_of
        if class_of is None:
            class_of = {value: value for value in range(len(self.classes))} | {IGNORE: IGNORE}
        return read_classes(sample, class_of)


@dataclass(frozen=True)
class Crop:
    """The rows and columns that are scored, in pixels of maps of exactly `height` x `width`."""

    height: int
    width: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class DepthDataset:
    """A data set with a distance per pixel.

    Attributes:
        name: For people.
        layout: One of `DEPTH_LAYOUTS`, never "auto".
        train: Samples to fit on, sorted by name.
        val: Samples to score on, sorted by name.
        min_depth: Nearest distance that is scored, in metres.
        max_depth: Farthest distance that is scored, in metres.
        units_per_metre: Of 16-bit PNG files; NumPy files hold metres.
        crop: What of each map is scored; None: all of it.
    """

    name: str
    layout: str
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    min_depth: float
    max_depth: float
    units_per_metre: float = 1000.0
    crop: Crop | None = None

    def read_depth(self, sample: Sample) -> Tensor:
        """The depth map at its own size; float32 `[H, W]` in metres, 0 = no measurement.

        Values beyond `min_depth` and `max_depth` are kept. A map may lack any measurement.

        Raises:
            DatasetError: It cannot be read, has not the format, or not the image's aspect.
        """
        return read_metres(sample, units_per_metre=self.units_per_metre)

    def eval_mask(self, height: int, width: int) -> Tensor | None:
        """Which pixels of a map are scored, bool `[height, width]`; None: all of them.

        Raises:
            DatasetError: The crop is defined for maps of another size.
        """
        crop = self.crop
        if crop is None:
            return None
        if (height, width) != (crop.height, crop.width):
            raise DatasetError(
                f"a depth map of {self.name} has {height}x{width} px, but the part that is scored "
                f"is defined for {crop.height}x{crop.width} px; use the maps at that size"
            )
        mask_HW = torch.zeros(height, width, dtype=torch.bool)
        mask_HW[slice(*crop.rows), slice(*crop.columns)] = True
        return mask_HW
