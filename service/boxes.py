"""Boxes of a request: counted, read and checked, then cut out of the tokens of a batch.

A box is `x0, y0, x1, y1` in pixels of the upright image as it was sent. ROI-align samples it into
`box_size` x `box_size` vectors, as `torchvision.ops.roi_align` does with `aligned=True`. What lies
outside of the image counts as zeros, and an empty box gives zeros; a box turned inside out is
refused.

Dimension key: K = boxes of an image, R = boxes of a batch, p = box_size, V = K * p * p vectors of
an image, C = channels, H, W = an image as sent, in pixels.
"""

import reprlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbone import DenseFeatures
from kernels import roi_align
from service.errors import InvalidOptionError, TooManyBoxesError

Box = tuple[float, float, float, float]
MAX_BOX_SIZE = 64
# How far a box may reach beyond the image, in image sides. More is a mistake in the units, and
# would cost the average of as many samples.
_MAX_OVERHANG = 1.0


class BoxLimits(NamedTuple):
    """What the boxes of a request may come to."""

    max_image_boxes: int
    max_vectors: int  # boxes x box_size x box_size x layers, of all images


class Regions(NamedTuple):
    """The boxes of an image, and how they are wanted."""

    boxes_K4: Tensor  # float32, shares of the image's sides
    box_size: int
    normalize: bool

    @property
    def num_boxes(self) -> int:
        return self.boxes_K4.shape[0]

    @property
    def num_vectors(self) -> int:
        """Feature vectors that the boxes ask for, in each layer."""
        return self.num_boxes * self.box_size**2


def read_boxes(
    value: object, *, num_images: int, vectors_per_box: int, limits: BoxLimits
) -> tuple[tuple[Box, ...], ...]:
    """The option `boxes` as one list of boxes per image; a flat list of boxes is one image's.

    The lists are counted before anything in them is read: a large body holds millions of boxes.

    Args:
        value: As it came out of JSON.
        num_images: Images of the request.
        vectors_per_box: Feature vectors that a box asks for, in all layers.
        limits: Most boxes and vectors.

    Raises:
        InvalidOptionError: it is no list of boxes for each image, or a box is not four finite
            numbers.
        TooManyBoxesError: there are too many.
    """
    if not isinstance(value, list):
        raise InvalidOptionError(
            f"option 'boxes' is {_shown(value)}; wanted: a list of [x0, y0, x1, y1], or one such "
            "list for each image"
        )
    boxes = [value] if _is_one_image(value, num_images) else value
    _check_counts(boxes, num_images, vectors_per_box, limits)
    return tuple(
        tuple(_read_box(box, number, index) for number, box in enumerate(image_boxes))
        for index, image_boxes in enumerate(boxes)
    )


def _is_one_image(value: list[Any], num_images: int) -> bool:
    """Whether a list is meant as boxes, by its first item: a list that begins with no list."""
    if not value:
        return num_images == 1
    first = value[0]
    return isinstance(first, list) and bool(first) and not isinstance(first[0], list)


def _check_counts(
    boxes: list[Any], num_images: int, vectors_per_box: int, limits: BoxLimits
) -> None:
    if boxes and not isinstance(boxes[0], list):
        raise _not_a_list(boxes[0])
    if len(boxes) != num_images:
        raise InvalidOptionError(
            f"option 'boxes' does not fit the images (lists of boxes: {len(boxes)}, images: "
            f"{num_images}); several images need a list each, an empty one for an image without "
            "boxes, in the JSON options: [[[x0, y0, x1, y1]], []]"
        )
    num_boxes = 0
    for index, image_boxes in enumerate(boxes):
        if not isinstance(image_boxes, list):
            raise _not_a_list(image_boxes)
        if len(image_boxes) > limits.max_image_boxes:
            raise TooManyBoxesError(
                f"image {index} has {len(image_boxes)} boxes, {limits.max_image_boxes} are "
                "allowed; send the others in another request",
                index=index,
            )
        num_boxes += len(image_boxes)
    num_vectors = num_boxes * vectors_per_box
    if num_vectors > limits.max_vectors:
        raise TooManyBoxesError(
            f"the boxes ask for {num_vectors} vectors (boxes x box_size x box_size x layers), "
            f"{limits.max_vectors} are allowed; ask for fewer boxes, a smaller box_size or fewer "
            "layers, or send several requests"
        )


def _not_a_list(image_boxes: object) -> InvalidOptionError:
    return InvalidOptionError(
        f"option 'boxes': {_shown(image_boxes)} is no list of boxes of an image"
    )


def _read_box(box: object, number: int, index: int) -> Box:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise InvalidOptionError(
            f"option 'boxes': box {number} of image {index} is {_shown(box)}, not 4 finite numbers",
            index=index,
        )
    x0, y0, x1, y1 = map(float, box)
    return x0, y0, x1, y1


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return abs(number) <= sys.float_info.max  # false for a NaN; an int may be beyond any float


class _ShortRepr(reprlib.Repr):
    """Text of a value that does not go through all of a long one."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:  # noqa: ARG002 - its signature
        return "{...}" if x else "{}"  # the library sorts all keys


def _shown(value: object) -> str:
    return _ShortRepr().repr(value)[:80]


def regions_of(
    boxes: Sequence[Box], original: tuple[int, int], *, index: int, box_size: int, normalize: bool
) -> Regions:
    """The regions of image `index`, given its (H, W).

    Raises:
        InvalidOptionError: a box is turned inside out, or further from its image than the image
            is large.
    """
    return Regions(_shares(boxes, original, index=index), box_size, normalize)


def _shares(boxes: Sequence[Box], original: tuple[int, int], *, index: int) -> Tensor:
    height, width = original
    sides = torch.tensor([width, height, width, height], dtype=torch.float64)
    shares_K4 = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) / sides
    is_turned_K = (shares_K4[:, 2:] < shares_K4[:, :2]).any(dim=-1)
    if bool(is_turned_K.any()):
        number = int(is_turned_K.nonzero()[0])
        raise InvalidOptionError(
            f"box {number} of image {index} is {list(boxes[number])}: its second corner lies "
            "before its first; give x0, y0, x1, y1 (not x, y, width, height)",
            index=index,
        )
    is_far_K = ((shares_K4 < -_MAX_OVERHANG) | (shares_K4 > 1 + _MAX_OVERHANG)).any(dim=-1)
    if bool(is_far_K.any()):
        number = int(is_far_K.nonzero()[0])
        raise InvalidOptionError(
            f"box {number} of image {index} is {list(boxes[number])}: it reaches further beyond "
            f"the image than the image is wide or high ({width}x{height} px); give x0, y0, x1, y1 "
            "in pixels of the upright image, before any resizing",
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
        `rois_VC` of each image, in the dtype of the tokens; float32 if normalised, because bfloat16
        rounds lengths away from 1.
    """
    p, normalize = regions[0].box_size, regions[0].normalize
    boxes_R4 = torch.cat([region.boxes_K4 for region in regions])
    if features.tokens.is_cuda:  # without waiting for what runs there
        boxes_R4 = boxes_R4.pin_memory().to(features.tokens.device, non_blocking=True)
    rois_RPC = roi_align(
        features.tokens,
        boxes_R4,
        grid=features.grid,
        output_size=(p, p),
        num_boxes=[region.num_boxes for region in regions],
        normalize=normalize,
        dtype=torch.float32 if normalize else features.tokens.dtype,
    )
    return list(torch.split(rois_RPC.flatten(0, 1), [region.num_vectors for region in regions]))
