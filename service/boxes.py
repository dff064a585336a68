"""Boxes of a request: read and checked, then cut out of the tokens of a batch.

A box is `x0, y0, x1, y1` in pixels of the upright image as it was sent. ROI-align samples it into
`box_size` x `box_size` cells, as `torchvision.ops.roi_align` does with `aligned=True`. What lies
outside of the image counts as zeros, and an empty box gives zeros.

Dimension key: K = boxes of an image, R = boxes of a batch, B = images, N = patch tokens,
C = channels, p = box_size, H, W = an image as sent, in pixels.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backbone import DenseFeatures
from kernels import roi_align
from service.errors import InvalidOptionError

Box = tuple[float, float, float, float]
MAX_BOX_SIZE = 64
# How far a box may reach beyond the image, in image sides. More is a mistake in the units, and
# would cost the average of as many samples.
_MAX_OVERHANG = 1.0


class Regions(NamedTuple):
    """The boxes of an image, and how they are wanted."""

    boxes_K4: Tensor  # float32, shares of the image's sides
    box_size: int
    normalize: bool

    @property
    def num_boxes(self) -> int:
        return self.boxes_K4.shape[0]

    @property
    def num_cells(self) -> int:
        """Vectors that the boxes come to."""
        return self.num_boxes * self.box_size**2


def read_boxes(value: object) -> object:
    """The option `boxes` with one list of boxes per image; a flat list of boxes is one image's.

    Raises:
        ValueError: it is none of the two, or a box is not four finite numbers.
    """
    if value is None or not isinstance(value, list | tuple):
        return value
    if any(_is_box(item) for item in value):
        value = [value]
    for index, boxes in enumerate(value):
        if not isinstance(boxes, list | tuple):
            raise ValueError(f"{_shown(boxes)} is no list of boxes of an image")
        for number, box in enumerate(boxes):
            if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_finite, box)):
                raise ValueError(
                    f"box {number} of image {index} is {_shown(box)}, not 4 finite numbers"
                )
    # Tuples: what comes out of here is validated as Python's values, not as JSON's.
    return tuple(tuple(tuple(map(float, box)) for box in boxes) for boxes in value)


def _is_box(item: object) -> bool:
    """Whether an item of `boxes` is meant as a box: a list that has something else than lists."""
    return isinstance(item, list | tuple) and any(not isinstance(x, list | tuple) for x in item)


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return abs(number) <= sys.float_info.max  # false for a NaN; an int may be beyond any float


def _shown(value: object) -> str:
    return repr(value)[:80]


def check_boxes(
    boxes: Sequence[Sequence[Box]] | None,
    box_size: int,
    num_images: int,
    *,
    max_image_boxes: int,
    max_cells: int,
) -> None:
    """
    Raises:
        InvalidOptionError: there are more or fewer lists than images, too many boxes in one, or
            too many cells in all.
    """
    if boxes is None:
        return
    if len(boxes) != num_images and not (num_images == 1 and not boxes):
        raise InvalidOptionError(
            f"option 'boxes' has {len(boxes)} lists of boxes for {num_images} images; "
            "give one list for each image, an empty one for an image without boxes"
        )
    for index, of_image in enumerate(boxes):
        if len(of_image) > max_image_boxes:
            raise InvalidOptionError(
                f"image {index} has {len(of_image)} boxes, {max_image_boxes} are allowed; "
                "send the others in another request",
                index=index,
            )
    num_cells = sum(map(len, boxes)) * box_size**2
    if num_cells > max_cells:
        raise InvalidOptionError(
            f"the boxes are {num_cells} cells (boxes x box_size x box_size), {max_cells} are "
            "allowed; ask for a smaller box_size, or send them in several requests"
        )


def regions_per_image(
    boxes: Sequence[Sequence[Box]] | None,
    originals: Sequence[tuple[int, int]],
    *,
    box_size: int,
    normalize: bool,
) -> Sequence[Regions | None]:
    """The regions of each image of a request, given (H, W) of the images; None without boxes.

    Raises:
        InvalidOptionError: a box is further from its image than the image is large.
    """
    if boxes is None:
        return [None] * len(originals)
    per_image = boxes or [()]  # an empty flat list: no box in the only image
    return [
        Regions(_shares(of_image, original, index=index), box_size, normalize)
        for index, (of_image, original) in enumerate(zip(per_image, originals, strict=True))
    ]


def _shares(boxes: Sequence[Box], original: tuple[int, int], *, index: int) -> Tensor:
    height, width = original
    sides = torch.tensor([width, height, width, height], dtype=torch.float64)
    shares_K4 = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) / sides
    is_far_K = ((shares_K4 < -_MAX_OVERHANG) | (shares_K4 > 1 + _MAX_OVERHANG)).any(dim=-1)
    if bool(is_far_K.any()):
        number = int(is_far_K.nonzero()[0])
        raise InvalidOptionError(
            f"box {number} of image {index} is {list(boxes[number])}, further outside than the "
            f"image's own {width}x{height} px (width x height); give x0, y0, x1, y1 in pixels of "
            "the image as sent",
            index=index,
        )
    return shares_K4.float()


@torch.inference_mode()
def align(features: DenseFeatures, regions: Sequence[Regions]) -> list[Tensor]:
    """Cut the boxes of all images of a batch out of its tokens at once, on the tokens' device.

    Args:
        features: Of the batch.
        regions: Of each image; `box_size` and `normalize` are the same in all.

    Returns:
        `rois [K * p * p, C]` of each image, in the dtype of the tokens, on the CPU.
    """
    p = regions[0].box_size
    rois_RPC = roi_align(
        features.tokens,
        torch.cat([region.boxes_K4 for region in regions]),
        grid=features.grid,
        output_size=(p, p),
        num_boxes=[region.num_boxes for region in regions],
        normalize=regions[0].normalize,
        dtype=features.tokens.dtype,
    )
    rois = rois_RPC.flatten(0, 1).cpu()
    return list(torch.split(rois, [region.num_cells for region in regions]))
