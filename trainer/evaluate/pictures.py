"""Square pictures for measures that need no labels, read as training images are."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trainer.config import Recipe
from trainer.data import BadImages, Source
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.views import picture_side
from trainer.prepare import readable_images


class Pictures(NamedTuple):
    """Pixels, uint8; all of them square.

    Attributes:
        images_BSS: What shares and norms are of, [B, 3, S, S].
        larger_BLL: The same at the side `views.picture_side`, which crops are cut from.
        reference_3SS: The reference image.
    """

    images_BSS: Tensor
    larger_BLL: Tensor
    reference_3SS: Tensor


def read_pictures(
    source: Source,
    order: Sequence[int],
    recipe: Recipe,
    bad: BadImages,
    *,
    reference_3SS: Tensor,
    patch_size: int,
    count: int,
) -> Pictures:
    """The first `count` readable images of an order, at the size of the reference image.

    Args:
        source: Images.
        order: Numbers of images.
        recipe: Its section `data` says how an image becomes square.
        bad: What is done about unreadable images.
        reference_3SS: The reference image, uint8.
        patch_size: Of what is measured, in pixels.
        count: How many.

    Raises:
        DataError: not one can be read, or an unreadable one is not to be skipped.
    """
    size = reference_3SS.shape[-1]
    larger = picture_side(size, patch_size)
    images_BSS, larger_BLL = (
        readable_images(source, order, recipe, bad, size=side, count=count)
        for side in (size, larger)
    )
    return Pictures(images_BSS, larger_BLL, reference_3SS)


def check_square_size(size: int, patch_size: int, name: str) -> None:
    """Refuse a side that is not whole patches, or fewer than two, which have nothing to compare.

    Raises:
        EvaluationError: it is.
    """
    if size < 2 * patch_size or size % patch_size:
        near = max(2, round(size / patch_size)) * patch_size
        raise EvaluationError(
            f"size {size} px is not a whole number of {name}'s {patch_size} px patches, two at "
            f"least; ask for {near}"
        )
