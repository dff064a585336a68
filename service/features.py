"""`POST /features`: one request from its body to its answer."""

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service import errors
from service.answering import FeatureRequest
from service.bodies import body_kind, check_encoding, read_body
from service.lifecycle import FeatureService
from service.negotiation import MEDIA_TYPES, negotiate
from service.responses import FramesResponse
from service.schemas import describe_request
from service.stages import Stages

FEATURE_ERRORS = (
    errors.MalformedBodyError,
    errors.MalformedImageError,
    errors.MalformedPixelsError,
    errors.InvalidDeadlineError,
    errors.UnauthorizedError,
    errors.UrlRefusedError,
    errors.UnknownModelError,
    errors.NotAcceptableError,
    errors.BodyTooSlowError,
    errors.BodyTooLargeError,
    errors.TooManyImagesError,
    errors.ImageTooLargeError,
    errors.UnsupportedBodyError,
    errors.UnsupportedImageError,
    errors.UnknownOptionError,
    errors.InvalidOptionError,
    errors.TooManyLayersError,
    errors.TooManyBoxesError,
    errors.ResponseTooLargeError,
    errors.UndecodableImageError,
    errors.FeatureOverflowError,
    errors.OverloadedError,
    errors.HeadersTooLargeError,
    errors.InternalError,
    errors.EncodingFailedError,
    errors.UrlFetchError,
    errors.NotReadyError,
    errors.DrainingError,
    errors.DeadlineError,
)

router = APIRouter()


async def get_service(request: Request) -> FeatureService:  # a plain function costs a thread
    service: FeatureService = request.app.state.service
    return service


ServiceDep = Annotated[FeatureService, Depends(get_service)]


@router.post(
    "/features",
    response_class=Response,
    summary="Dense features of one or more images",
    responses={
        200: {
            "description": "Features",
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES
            },
        },
        304: {"description": "The client has the answer already (`If-None-Match`)"},
        **errors.responses(*FEATURE_ERRORS),
    },
    openapi_extra=describe_request(),
)
async def features(request: Request, service: ServiceDep) -> Response:
    """Features of every patch of the images, the register border stripped, or of boxes in them.

    Send one image as the body, several as `multipart/form-data` (`images`, repeated, and
    `options` as JSON), JSON with base64, or a batch of uint8 pixels `[B, H, W, 3]` as npy or
    safetensors. `Accept` chooses safetensors (default; tensors `features.0`, ... and all metadata
    in its header), frames (a stream of safetensors, one per image, as they are done), npy or raw
    bytes (one array), JSON (base64) or PNG (a picture of the principal components).
    """
    service.check_accepting()
    stages = Stages()
    media = negotiate(request.headers.get("accept"))
    kind = body_kind(request.headers.get("content-type"))
    check_encoding(request.headers.get("content-encoding"))
    with ExitStack() as held:
        take = held.enter_context(service.bodies.hold())
        body = await read_body(
            request.stream(),
            max_bytes=service.settings.max_body_bytes,
            declared=request.headers.get("content-length"),
            waits="100-continue" in request.headers.get("expect", ""),
            take=take,
        )
        service.metrics.body_bytes.inc(len(body))
        stages.end("read")
        answer = FeatureRequest(
            service,
            media,
            kind,
            request.query_params.multi_items(),
            if_none_match=request.headers.get("if-none-match"),
            deadline=request.scope["state"].get("deadline"),
            stages=stages,
            spans=request.scope["state"]["stages"],
        )
        response = await _unless_abandoned(answer.answer(body), request.receive)
        if isinstance(response, FramesResponse):
            response.at_end(held.pop_all().close)  # its images are still in the body
        return response


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
