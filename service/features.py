"""`POST /features`: one request from its body to its answer.

Dimension key: H, W = an image as sent, in pixels.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from backbone.errors import ImageError
from backbone.preprocess import resolve_size
from service import errors, wire
from service.batcher import BatcherClosedError, EncodedImage, QueuedImage
from service.bodies import IMAGE_TYPES, BodyKind, Payload, body_kind, parse_payload, read_body
from service.boxes import BoxLimits, Regions, regions_per_image
from service.decoding import DecodedImage, decode_resized
from service.lifecycle import FeatureService
from service.metrics import Stage
from service.schemas import FeatureOptions, describe_request, parse_options

FEATURE_ERRORS = (
    errors.MalformedBodyError,
    errors.MalformedImageError,
    errors.NotAcceptableError,
    errors.BodyTooLargeError,
    errors.TooManyImagesError,
    errors.ImageTooLargeError,
    errors.UnsupportedBodyError,
    errors.UnsupportedImageError,
    errors.UnknownOptionError,
    errors.InvalidOptionError,
    errors.ResponseTooLargeError,
    errors.UndecodableImageError,
    errors.FeatureOverflowError,
    errors.InternalError,
    errors.EncodingFailedError,
    errors.NotReadyError,
    errors.DrainingError,
)

# Converting so few values takes 0.1 ms, less than the way to a thread that may be decoding.
_INLINE_VALUES = 65536
# Lists of a JSON body that are no boxes: `images`, `boxes`, `size`, `layers`, and what is mistaken.
_OTHER_LISTS = 16

router = APIRouter()


async def get_service(request: Request) -> FeatureService:  # a plain function costs a thread
    service: FeatureService = request.app.state.service
    return service


ServiceDep = Annotated[FeatureService, Depends(get_service)]


@dataclass(slots=True)
class Stages:
    """Seconds that a request spent in each stage."""

    seconds: dict[Stage, float] = field(default_factory=dict)
    _mark: float = field(default_factory=time.perf_counter)

    def end(self, stage: Stage) -> None:
        """The stage that began when the last one ended is over."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._mark
        self._mark = now

    def skip_to_now(self) -> None:
        self._mark = time.perf_counter()

    def header(self) -> str:
        """The value of `Server-Timing`, in milliseconds."""
        return ", ".join(f"{name};dur={value * 1e3:.2f}" for name, value in self.seconds.items())


@router.post(
    "/features",
    response_class=Response,
    summary="Dense features of one or more images",
    responses={
        200: {
            "description": "Features",
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in wire.MEDIA_TYPES
            },
        },
        **errors.responses(*FEATURE_ERRORS),
    },
    openapi_extra=describe_request(IMAGE_TYPES),
)
async def features(request: Request, service: ServiceDep) -> Response:
    """Features of every patch of the images, the register border stripped, or of boxes in them.

    Send one image as the body, several as `multipart/form-data` (`images`, repeated, and
    `options` as JSON), or JSON with base64. `Accept` chooses safetensors (default; tensors
    `features.0`, ... and all metadata in its header), npy (one array) or JSON (base64).
    """
    service.check_accepting()
    stages = Stages()
    media = wire.negotiate(request.headers.get("accept"))
    kind = body_kind(request.headers.get("content-type"))
    body = await read_body(
        request.stream(),
        max_bytes=service.settings.max_body_bytes,
        declared=request.headers.get("content-length"),
        waits="100-continue" in request.headers.get("expect", ""),
    )
    service.metrics.body_bytes.inc(len(body))
    stages.end("read")
    answer = FeatureRequest(service, media, kind, request.query_params.multi_items(), stages)
    return await _unless_abandoned(answer.answer(body), request.receive)


async def _unless_abandoned(answer: Coroutine[Any, Any, Response], receive: Receive) -> Response:
    """The answer; if the client hangs up first, what is left of the work is cancelled.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class FeatureRequest:
    """The work for one request once its body has arrived."""

    def __init__(
        self,
        service: FeatureService,
        media: wire.MediaType,
        kind: BodyKind,
        query: Sequence[tuple[str, str]],
        stages: Stages,
    ) -> None:
        self._service = service
        self._encoder = service.encoder
        self._media = media
        self._kind = kind
        self._query = query
        self._stages = stages

    async def answer(self, body: bytes) -> Response:
        """
        Raises:
            ServiceError: whatever stands in the way.
        """
        payload = await self._parse(body)
        options = await self._options(payload)
        layers = resolve_layers(options.layers, self._encoder.backbone.depth)
        decoded = await self._decode(payload.images, options)
        regions = regions_per_image(
            options.boxes,
            [image.original for image in decoded],
            box_size=options.box_size,
            normalize=options.normalize,
        )
        num_values = self._num_values(decoded, regions, layers)
        wire.check_response_size(self._media, num_values, options)
        self._stages.end("decode")
        encoded = await self._encode(decoded, regions, layers)
        self._stages.skip_to_now()
        source = wire.Source(
            model=self._service.settings.model,
            digest=self._encoder.digest,
            patch_size=self._encoder.patch_size,
            layers=layers,
        )
        work = (self._media, decoded, encoded, options, source)
        if num_values <= _INLINE_VALUES:
            parts = _serialise(*work)
        else:
            parts = await self._service.pool.run(_serialise, *work)
        self._stages.end("encode")
        for stage, seconds in self._stages.seconds.items():
            self._service.metrics.stage_seconds[stage].observe(seconds)
        return wire.PartsResponse(
            parts, self._media, {"server-timing": self._stages.header(), "vary": "accept"}
        )

    async def _parse(self, body: bytes) -> Payload:
        settings = self._service.settings
        parse = partial(
            parse_payload,
            self._kind,
            body,
            max_images=settings.max_images,
            # One for each box and each image's boxes, and those around them.
            max_lists=settings.max_box_vectors + settings.max_images + _OTHER_LISTS,
        )
        return parse() if self._kind.form == "image" else await self._service.pool.run(parse)

    async def _options(self, payload: Payload) -> FeatureOptions:
        settings = self._service.settings
        parse = partial(
            parse_options,
            self._query,
            payload.options,
            num_images=len(payload.images),
            box_limits=BoxLimits(settings.max_image_boxes, settings.max_box_vectors),
        )
        # A body may list as many boxes as are allowed, which takes a tenth of a second to read.
        return await self._service.pool.run(parse) if payload.options else parse()

    async def _decode(self, images: Sequence[bytes], options: FeatureOptions) -> list[DecodedImage]:
        def choose_size(height: int, width: int) -> tuple[int, int]:
            size = options.size or self._encoder.native_size
            resized = resolve_size(height, width, size, self._encoder.patch_size)
            self._check_tokens(*resized)
            return resized

        max_pixels = self._service.settings.max_image_pixels
        results = await asyncio.gather(
            *(
                self._service.pool.run(decode_resized, data, choose_size, max_pixels)
                for data in images
            ),
            return_exceptions=True,
        )
        decoded = []
        for index, result in enumerate(results):
            if isinstance(result, ImageError):
                raise errors.from_image_error(result, index)
            if isinstance(result, BaseException):
                raise result
            decoded.append(result)
        return decoded

    def _check_tokens(self, height: int, width: int) -> None:
        num_tokens = self._encoder.num_tokens(height, width)
        limit = self._service.settings.max_image_tokens
        if num_tokens > limit:
            raise errors.InvalidOptionError(
                f"an image of {height}x{width} px costs {num_tokens} tokens, {limit} are allowed; "
                "ask for a smaller size"
            )

    def _num_values(
        self,
        images: Sequence[DecodedImage],
        regions: Sequence[Regions | None],
        layers: Sequence[int],
    ) -> int:
        patch_area = self._encoder.patch_size**2
        num_vectors = sum(
            image.resized[0] * image.resized[1] // patch_area
            if image_regions is None
            else image_regions.num_vectors
            for image, image_regions in zip(images, regions, strict=True)
        )
        return num_vectors * self._encoder.backbone.embed_dim * len(layers)

    async def _encode(
        self,
        images: Sequence[DecodedImage],
        regions: Sequence[Regions | None],
        layers: tuple[int, ...],
    ) -> list[EncodedImage]:
        batcher = self._service.batcher
        try:
            waiting = [
                asyncio.wrap_future(
                    batcher.submit(
                        QueuedImage(
                            image.pixels_3hw,
                            layers,
                            self._encoder.num_tokens(*image.resized),
                            image_regions,
                        )
                    )
                )
                for image, image_regions in zip(images, regions, strict=True)
            ]
        except BatcherClosedError:
            raise errors.NotReadyError("the engine has stopped; retry in a moment") from None
        results = await asyncio.gather(*waiting, return_exceptions=True)
        encoded = []
        for index, result in enumerate(results):
            if isinstance(result, errors.EncodingFailedError):
                raise errors.EncodingFailedError(f"image {index}: {result}", index=index)
            if isinstance(result, BaseException):
                raise result
            encoded.append(result)
        seconds = self._stages.seconds
        seconds["queue"] = max(result.queue_seconds for result in encoded)
        seconds["forward"] = max(result.forward_seconds for result in encoded)
        return encoded


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block numbers counted from 0.

    Raises:
        InvalidOptionError: a block that the model does not have, or one named twice.
    """
    resolved = tuple(layer + depth if layer < 0 else layer for layer in layers)
    for asked, layer in zip(layers, resolved, strict=True):
        if not 0 <= layer < depth:
            raise errors.InvalidOptionError(
                f"option 'layers' has {asked}; the {depth} blocks are {-depth} to {depth - 1}"
            )
    if len(set(resolved)) < len(resolved):
        raise errors.InvalidOptionError(f"option 'layers' names a block twice: {list(layers)}")
    return resolved


def _serialise(
    media: wire.MediaType,
    decoded: Sequence[DecodedImage],
    encoded: Sequence[EncodedImage],
    options: FeatureOptions,
    source: wire.Source,
) -> list[wire.Part]:
    images = [
        wire.ImageFeatures(
            arrays=tuple(
                wire.to_array(vectors_VC, result.grid, options, index=index)
                for vectors_VC in result.vectors_VC
            ),
            grid=result.grid,
            original=image.original,
            resized=image.resized,
        )
        for index, (image, result) in enumerate(zip(decoded, encoded, strict=True))
    ]
    return wire.serialise(media, images, options, source)
