"""Depth maps in metres, from 16-bit PNG files or NumPy arrays."""

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.datasets.pixels import image_size, read_npy, read_png
from trainer.evaluate.datasets.samples import DatasetError, Sample

_WANTED = (
    "a depth map is a PNG file of one channel with 16 bits (8 bits are too coarse), or a NumPy "
    "array of metres"
)


def read_metres(sample: Sample, *, units_per_metre: float) -> Tensor:
    """Distances in metres, float32 `[H, W]`; 0 = no measurement.

    Args:
        units_per_metre: Of PNG files; NumPy files hold metres, NaN and infinity for no measurement.

    Raises:
        DatasetError: See `DepthDataset.read_depth`.
    """
    path = sample.target
    if path.suffix.lower() == ".npy":
        stored_HW = read_npy(path)
        if stored_HW.dtype.kind != "f" or stored_HW.ndim != 2:
            raise DatasetError(
                f"{path} holds {stored_HW.dtype} of shape {list(stored_HW.shape)}; a depth map is "
                "an array [height, width] of floating point, in metres"
            )
        metres_HW = np.nan_to_num(stored_HW.astype(np.float32), nan=0, posinf=0, neginf=0)
        if (metres_HW < 0).any():
            raise DatasetError(
                f"{path} holds negative distances, down to {metres_HW.min():g} m; mark pixels "
                "without a measurement with 0 or NaN"
            )
    else:
        modes = ("I;16", "I;16B", "I;16L", "I")
        metres_HW = read_png(path, modes=modes, wanted=_WANTED).astype(np.float32)
        metres_HW /= units_per_metre
    _check_aspect(sample, metres_HW.shape[0], metres_HW.shape[1])
    return torch.from_numpy(metres_HW)


def _check_aspect(sample: Sample, height: int, width: int) -> None:
    """Depth cameras have fewer pixels than colour ones, but see the same part of the scene."""
    image_height, image_width = image_size(sample.image)
    if abs(height * image_width - width * image_height) >= max(image_height, image_width):
        raise DatasetError(
            f"{sample.target} has {height}x{width} px and its image {sample.image} "
            f"{image_height}x{image_width} px (height x width); a depth map has its image's aspect"
        )
