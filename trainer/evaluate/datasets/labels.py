"""Label maps: what is stored becomes class numbers, and nothing unknown gets through."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.datasets.pixels import image_size, read_png
from trainer.evaluate.datasets.samples import DatasetError, Sample

_WANTED = (
    "a label map is a PNG file of one channel with 8 bits, grey or palette, whose values are "
    "class numbers"
)
_UNKNOWN = -1
_NAMED = 5


def read_classes(sample: Sample, class_of: Mapping[int, int]) -> Tensor:
    """The class number of each pixel of the image; uint8 `[H, W]`.

    Args:
        class_of: Class number of each value that the file may hold.

    Raises:
        DatasetError: See `SegmentationDataset.read_label`.
    """
    stored_HW = read_png(sample.target, modes=("L", "P"), wanted=_WANTED)
    _check_size(sample, (stored_HW.shape[0], stored_HW.shape[1]))
    table = np.full(256, _UNKNOWN, np.int16)
    table[list(class_of)] = list(class_of.values())
    classes_HW = table[stored_HW]
    if (classes_HW == _UNKNOWN).any():
        unknown = np.unique(stored_HW[classes_HW == _UNKNOWN])
        named = ", ".join(map(str, unknown[:_NAMED])) + (", ..." if len(unknown) > _NAMED else "")
        raise DatasetError(
            f"{sample.target} holds the value{'s' if len(unknown) > 1 else ''} {named}, which the "
            f"data set does not know; {in_ranges(class_of)} are allowed"
        )
    return torch.from_numpy(classes_HW.astype(np.uint8))


def _check_size(sample: Sample, size: tuple[int, int]) -> None:
    image = image_size(sample.image)
    if image != size:
        raise DatasetError(
            f"{sample.target} has {size[0]}x{size[1]} px and its image {sample.image} "
            f"{image[0]}x{image[1]} px (height x width); a label map has its image's size"
        )


def in_ranges(values: Iterable[int]) -> str:
    """Whole numbers in words, as "0 to 18 and 255"."""
    runs: list[tuple[int, int]] = []
    for value in sorted(values):
        if runs and runs[-1][1] == value - 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    words = [str(low) if low == high else f"{low} to {high}" for low, high in runs]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
