"""The HTTP application: routes around a `FeatureService`."""

import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from service import admin, errors, features, schemas
from service.features import ServiceDep
from service.hints import nearest
from service.information import describe, project_version
from service.lifecycle import FeatureService
from service.middleware import error_response, install
from service.models import OpenEncoder
from service.settings import Settings
from service.web import routes as web

_DESCRIPTION = """Dense features of images from a refined vision transformer.

    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg -o features.safetensors \\
         URL/features      (URL: where this page is, without /docs)

Every error has the body `{"error": {"code", "message", "retryable", "request_id", "index"?}}`.
"""


def create_app(settings: Settings, open_encoder: OpenEncoder | None = None) -> FastAPI:
    """The application; its `state.service` is the `FeatureService` behind it.

    Args:
        settings: What the operator chose.
        open_encoder: Loads a model for a device; default what the settings say.

    Raises:
        SettingsError: the cache or the key file cannot be used as configured.
    """
    service = FeatureService(settings, open_encoder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="vit-refinery",
        version=project_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # A redirect would go to where the Host header says, behind a proxy also from https to http.
        redirect_slashes=False,
    )
    app.state.service = service
    service.metrics.show_build(
        version=app.version,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
    )
    install(app, service)
    app.add_exception_handler(errors.ServiceError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.include_router(features.router)
    app.include_router(admin.router)
    app.include_router(web.router)
    _add_probes(app)
    _add_information(app, with_metrics=settings.metrics_port is None)
    return app


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
    # Some load balancers ask with HEAD.
    for path, probe in (("/livez", livez), ("/healthz", livez), ("/readyz", readyz)):
        app.head(path, include_in_schema=False)(probe)
    app.get("/livez", responses=failed, tags=["probes"])(livez)
    app.get("/healthz", responses=failed, tags=["probes"])(livez)
    app.get("/readyz", responses=failed_or_draining, tags=["probes"])(readyz)
    app.get("/startupz", responses=failed, tags=["probes"])(startupz)


def _add_information(app: FastAPI, *, with_metrics: bool) -> None:
    keyed = errors.responses(errors.UnauthorizedError, errors.NotReadyError)

    @app.get("/info", responses=keyed, tags=["information"])
    async def info(service: ServiceDep) -> schemas.Info:
        """The models, the limits, and what may be asked for."""
        return describe(service)

    if not with_metrics:
        return

    @app.get(
        "/metrics",
        response_class=Response,
        responses=errors.responses(errors.UnauthorizedError),
        tags=["information"],
    )
    async def metrics(service: ServiceDep) -> Response:
        """Metrics in Prometheus' text format."""
        service.refresh_gauges()
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
