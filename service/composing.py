"""From feature maps to the body of an answer; runs off the event loop when there is much to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.nn import functional as F

from service import errors, wire
from service.finishing import finish, pooled
from service.maps import FeatureMap
from service.negotiation import MediaType
from service.options import FeatureOptions
from service.pictures import pca_picture
from service.work import Item


@dataclass(frozen=True, slots=True)
class MappedImage:
    """An image and what the model says about it."""

    item: Item
    features: FeatureMap


class Body(NamedTuple):
    """The body of an answer."""

    parts: list[wire.Part]
    headers: dict[str, str]  # that go with it
    failures: list[wire.ImageFailure]  # of all images


def is_costly(media: MediaType, options: FeatureOptions) -> bool:
    """Whether making an answer takes more than converting what is sent.

    Boxes and averages read whole maps, however little comes of them; principal components take up
    to seconds.
    """
    asks_for_less = options.boxes is not None or options.pool != "none"
    return asks_for_less or options.project is not None or media == "image/png"


def serialise(
    media: MediaType, images: Sequence[MappedImage | wire.Answer], source: wire.Source
) -> Body:
    """The body of an answer.

    Args:
        images: Those that are not finished yet are finished here.

    Raises:
        ServiceError: about an image, unless the request is `partial`.
    """
    if media == "image/png":
        (mapped,) = images
        assert isinstance(mapped, MappedImage)
        return Body([_picture(mapped, source.options)], {}, [])
    answers = [composed(image, source) for image in images]
    answers.sort(key=lambda answer: answer.index)
    failures = [answer for answer in answers if isinstance(answer, wire.ImageFailure)]
    return Body(*wire.serialise(media, answers, source), failures)


def composed(image: MappedImage | wire.Answer, source: wire.Source) -> wire.Answer:
    """What is sent about an image; what is an answer already stays as it is.

    Raises:
        ServiceError: about the image, unless the request is `partial`.
    """
    if not isinstance(image, MappedImage):
        return image
    try:
        return finished(image, source)
    except errors.ServiceError as error:
        if not source.options.partial:
            raise
        index = image.item.index
        return wire.ImageFailure(index, errors.about_image(error, index))


def finished(mapped: MappedImage, source: wire.Source) -> wire.ImageAnswer:
    """An image in the shape that it was asked for.

    Raises:
        FeatureOverflowError, InvalidOptionError: see `finish`.
    """
    item, features = mapped.item, mapped.features
    image = finish(features, item.regions, source.options, index=item.index)
    patch_size = item.plan.model.encoder.patch_size
    return wire.ImageAnswer(
        index=item.index,
        image=image,
        original=features.original,
        resized=(features.grid[0] * patch_size, features.grid[1] * patch_size),
        num_boxes=item.regions.num_boxes if item.regions else None,
    )


def _picture(mapped: MappedImage, options: FeatureOptions) -> bytes:
    tokens_NC = mapped.features.layers[0].tokens_NC
    assert tokens_NC is not None
    vectors_VC, grid, _ = pooled(tokens_NC, mapped.features.grid, options.pool)
    if options.normalize:
        vectors_VC = F.normalize(vectors_VC.float(), dim=-1)
    return pca_picture(vectors_VC, grid)
