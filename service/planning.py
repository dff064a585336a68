"""The images of a request before any work on them: fetched, hashed, measured, named.

What stands in an image's way is found here as far as its header tells.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from backbone.errors import ImageError
from backbone.preprocess import decode_image
from service import errors
from service.bodies import ImageSource, ImageUrl
from service.boxes import Regions, regions_of
from service.decoding import WorkerPool
from service.models import ServedModel
from service.options import FeatureOptions
from service.pixels import Pixels
from service.settings import Settings
from service.urls import UrlFetcher
from service.wire import ImageFailure
from service.work import Examined, Item, examine, plan_item

# Of one request: few, because what they bring is only counted when it is there.
_FETCHES_AT_A_TIME = 4


class Planner:
    """Plans the images of requests; for the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        helpers: WorkerPool,
        decoders: WorkerPool,
        fetcher: UrlFetcher | None,
    ) -> None:
        self._settings = settings
        self._helpers = helpers
        self._decoders = decoders
        self._fetcher = fetcher

    async def plan(
        self,
        images: Sequence[ImageSource],
        options: FeatureOptions,
        model: ServedModel,
        layers: tuple[int, ...],
        *,
        lists_failures: bool,
    ) -> list[Item | ImageFailure]:
        """What each image costs, or why it cannot be had.

        Raises:
            ServiceError: about the first image that cannot, unless failures are to be listed.
        """
        fetched = await self._fetch(images)
        max_pixels = self._settings.max_image_pixels
        examined = await self._helpers.run(_examine_all, fetched, max_pixels)
        regions: Sequence[Regions | Exception | None] = [None] * len(fetched)
        if options.boxes is not None:  # tens of thousands, perhaps
            regions = await self._helpers.run(_regions_of_all, examined, options)
        planned: list[Item | ImageFailure] = []
        for index, (image, found, region) in enumerate(
            zip(fetched, examined, regions, strict=True)
        ):
            try:
                if isinstance(found, Exception):
                    raise found
                if isinstance(region, Exception):
                    raise region
                assert not isinstance(image, errors.ServiceError)
                planned.append(
                    plan_item(index, image, found, options, model, layers, region, self._settings)
                )
            except (ImageError, errors.ServiceError) as error:
                if not lists_failures:
                    await self._check_decodable(fetched[:index])
                    raise errors.about_image(error, index) from error
                planned.append(ImageFailure(index, errors.about_image(error, index)))
        return planned

    async def _check_decodable(
        self, images: Sequence[bytes | Pixels | errors.ServiceError]
    ) -> None:
        """Of several bad images the first is told about, also when its header was good.

        Raises:
            ServiceError: one of the images cannot be decoded.
        """
        max_pixels = self._settings.max_image_pixels
        for index, image in enumerate(images):
            if isinstance(image, bytes):
                try:
                    await self._decoders.run(partial(decode_image, image, max_pixels=max_pixels))
                except ImageError as error:
                    raise errors.from_image_error(error, index) from error

    async def _fetch(
        self, images: Sequence[ImageSource]
    ) -> list[bytes | Pixels | errors.ServiceError]:
        """The images, those behind URLs fetched, or why they could not be."""
        if not any(isinstance(image, ImageUrl) for image in images):
            return [image for image in images if not isinstance(image, ImageUrl)]
        fetcher = self._fetcher
        if fetcher is None:
            raise errors.UrlRefusedError(
                "images by URL are turned off here; send their bytes, or ask the operator for "
                "--allow-url-hosts"
            )

        limit = left = self._settings.max_body_bytes
        turns = asyncio.Semaphore(_FETCHES_AT_A_TIME)

        async def fetch(image: ImageSource) -> bytes | Pixels | errors.ServiceError:
            nonlocal left
            if not isinstance(image, ImageUrl):
                return image
            try:
                async with turns:
                    data: bytes = await fetcher.fetch(image.url) if left >= 0 else b""
            except errors.ServiceError as error:
                return error
            left -= len(data)
            if left >= 0:
                return data
            return errors.BodyTooLargeError(
                f"the files behind the URLs of the request have more than {limit} bytes together; "
                "send several requests"
            )

        return list(await asyncio.gather(*map(fetch, images)))


def _examine_all(
    images: Sequence[bytes | Pixels | errors.ServiceError], max_pixels: int
) -> list[Examined | Exception]:
    found: list[Examined | Exception] = []
    for image in images:
        try:
            found.append(image if isinstance(image, Exception) else examine(image, max_pixels))
        except (ImageError, errors.ServiceError) as error:
            found.append(error)
    return found


def _regions_of_all(
    examined: Sequence[Examined | Exception], options: FeatureOptions
) -> list[Regions | Exception | None]:
    assert options.boxes is not None
    regions: list[Regions | Exception | None] = []
    for index, found in enumerate(examined):
        if isinstance(found, Exception):
            regions.append(None)  # the image itself is at fault
            continue
        try:
            regions.append(
                regions_of(
                    options.boxes[index],
                    found.original,
                    index=index,
                    box_size=options.box_size,
                    normalize=options.normalize,
                )
            )
        except errors.ServiceError as error:
            regions.append(error)
    return regions
