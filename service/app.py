"""The HTTP application: routes around a `FeatureService`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import get_args

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from backbone.preprocess import supported_formats
from service import errors, features, schemas, wire
from service.bodies import REQUEST_TYPES
from service.boxes import MAX_BOX_SIZE
from service.features import ServiceDep
from service.hints import nearest
from service.lifecycle import FeatureService, OpenEncoder
from service.middleware import RequestMiddleware, error_response
from service.settings import Settings

_VERSIONS = ("torch", "torchvision", "timm", "pillow", "safetensors", "fastapi")
_DESCRIPTION = """Dense features of images from a refined vision transformer.

    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg -o features.safetensors \\
         http://127.0.0.1:8000/features

Every error has the body `{"error": {"code", "message", "retryable", "request_id", "index"?}}`.
"""


def create_app(settings: Settings, open_encoder: OpenEncoder | None = None) -> FastAPI:
    """The application; its `state.service` is the `FeatureService` behind it.

    Args:
        settings: What the operator chose.
        open_encoder: Loads the model for a device; default what the settings name.
    """
    service = FeatureService(settings, open_encoder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="vit-refinery",
        version=project_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(RequestMiddleware, service=service)
    app.add_exception_handler(errors.ServiceError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.include_router(features.router)
    _add_probes(app)
    _add_information(app)
    return app


def project_version() -> str:
    """Version of the installed project; a checkout that is not installed says so."""
    try:
        return metadata.version("vit-refinery")
    except metadata.PackageNotFoundError:
        return "0+checkout"


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    return error_response(error, request.state.request_id, request.app.state.service)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == errors.MethodNotAllowedError.status:
        allowed = (error.headers or {}).get("Allow", "")
        known: errors.ServiceError = errors.MethodNotAllowedError(
            f"{path[:80]} does not take {method}; use {allowed}"
        )
    elif error.status_code == errors.NotFoundError.status:
        paths = request.app.openapi()["paths"]
        known = errors.NotFoundError(f"no path {path[:80]!r}; {nearest(path, paths)}")
    else:
        known = errors.InternalError(f"unexpected answer {error.status_code}: {error.detail}")
    response = await _answer_error(request, known)
    response.headers.update(error.headers or {})
    return response


def _add_probes(app: FastAPI) -> None:
    async def livez(service: ServiceDep) -> schemas.Health:
        """Whether the process should be left running; not whether it takes requests."""
        if service.phase == "failed":
            raise errors.NotReadyError("the engine has failed; the service is about to exit")
        return schemas.Health()

    async def readyz(service: ServiceDep) -> schemas.Health:
        """Whether requests are taken: the model is loaded and warmed up, and nothing drains."""
        service.check_accepting()
        return schemas.Health()

    async def startupz(service: ServiceDep) -> schemas.Health:
        """Whether the model has been loaded and warmed up."""
        if service.phase in ("starting", "failed"):
            service.check_accepting()
        return schemas.Health()

    failed = errors.responses(errors.NotReadyError)
    failed_or_draining = errors.responses(errors.NotReadyError, errors.DrainingError)
    app.get("/livez", responses=failed, tags=["probes"])(livez)
    app.get("/healthz", responses=failed, tags=["probes"])(livez)
    app.get("/readyz", responses=failed_or_draining, tags=["probes"])(readyz)
    app.get("/startupz", responses=failed, tags=["probes"])(startupz)


def _add_information(app: FastAPI) -> None:
    @app.get("/info", responses=errors.responses(errors.NotReadyError), tags=["information"])
    async def info(service: ServiceDep) -> schemas.Info:
        """The model, the limits, and what may be asked for."""
        return describe(service)

    @app.get("/metrics", response_class=Response, tags=["information"])
    async def metrics(service: ServiceDep) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def describe(service: FeatureService) -> schemas.Info:
    """What `/info` says.

    Raises:
        NotReadyError: the model is not loaded and warmed up yet.
    """
    encoder, warm_up = service.encoder, service.engines[0].warm_up
    if warm_up is None:
        raise errors.NotReadyError("the model is being warmed up; retry in a moment")
    settings = service.settings
    return schemas.Info(
        version=project_version(),
        model=schemas.ModelInfo(
            name=settings.model,
            backbone=encoder.backbone.name,
            digest=encoder.digest,
            is_refined=encoder.manifest is not None,
            patch_size=encoder.patch_size,
            embed_dim=encoder.backbone.embed_dim,
            num_layers=encoder.backbone.depth,
            native_size=encoder.native_size,
            register_width=encoder.register_width(*encoder.native_size),
            precision=encoder.precision,
            devices=[str(engine.encoder.device) for engine in service.engines if engine.encoder],
        ),
        limits=schemas.LimitsInfo(
            max_body_bytes=settings.max_body_bytes,
            max_images=settings.max_images,
            max_image_pixels=settings.max_image_pixels,
            max_image_tokens=settings.max_image_tokens,
            max_image_boxes=settings.max_image_boxes,
            max_box_vectors=settings.max_box_vectors,
            max_box_size=MAX_BOX_SIZE,
            batch_tokens=settings.batch_tokens,
            max_json_values=wire.MAX_JSON_VALUES,
        ),
        image_formats=list(supported_formats()),
        request_types=list(REQUEST_TYPES),
        response_types=list(wire.MEDIA_TYPES),
        dtypes=list(get_args(schemas.Dtype)),
        layouts=list(get_args(schemas.Layout)),
        tolerance=schemas.Tolerance(
            max_relative_error=warm_up.max_relative_error,
            min_cosine=warm_up.min_cosine,
            measured_relative_error=warm_up.measured_relative_error,
            measured_cosine=warm_up.measured_cosine,
        ),
        versions={name: metadata.version(name) for name in _VERSIONS},
    )
