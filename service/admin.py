"""Models loaded and dropped while the service runs; for keys with the right `admin`."""

import logging

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backbone.errors import RefineryError
from kernels.dispatch import KernelError
from service import errors, schemas
from service.bodies import read_body
from service.features import ServiceDep
from service.information import describe_loaded
from service.settings import SettingsError

logger = logging.getLogger(__name__)

_MAX_BYTES = 16384
_KEY_ERRORS = (errors.UnauthorizedError, errors.ForbiddenError, errors.NotReadyError)

router = APIRouter(prefix="/admin", tags=["administration"])


class ModelRequest(BaseModel):
    """A model to load."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$",
        description="what requests call it in option `model`; it begins with no dot",
    )
    path: str = Field(
        min_length=1,
        max_length=1024,
        description="artifact folder on the server, timm model name or local-dir:PATH",
    )


@router.get("/models", responses=errors.responses(*_KEY_ERRORS))
async def list_models(service: ServiceDep) -> list[schemas.LoadedModelInfo]:
    """The models that are served; the first is the default."""
    return [describe_loaded(model) for model in service.registry.models]


@router.post(
    "/models",
    status_code=201,
    responses=errors.responses(
        *_KEY_ERRORS,
        errors.MalformedBodyError,
        errors.BodyTooLargeError,
        errors.InvalidOptionError,
        errors.ConflictError,
        errors.ModelLoadError,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ModelRequest.model_json_schema()}},
        }
    },
)
async def load_model(request: Request, service: ServiceDep) -> schemas.LoadedModelInfo:
    """Load and warm up a model, and serve it; answers when it is ready."""
    service.check_accepting()
    body = await read_body(
        request.stream(), max_bytes=_MAX_BYTES, declared=request.headers.get("content-length")
    )
    wanted = _parse(body)
    try:
        model = await service.load_model(wanted.name, wanted.path)
    except (RefineryError, SettingsError, KernelError, RuntimeError, OSError) as error:
        raise errors.ModelLoadError(f"{wanted.path}: {error}") from error
    logger.info("loaded model %s from %s", wanted.name, wanted.path)
    return describe_loaded(model)


@router.delete(
    "/models/{name}",
    status_code=204,
    responses=errors.responses(*_KEY_ERRORS, errors.UnknownModelError, errors.ConflictError),
)
async def drop_model(name: str, service: ServiceDep) -> None:
    """Serve a model no more; requests that have begun with it are still answered."""
    service.drop_model(name)


def _parse(body: bytes) -> ModelRequest:
    try:
        return ModelRequest.model_validate_json(body)
    except ValidationError as error:
        item = error.errors()[0]
        if item["type"] == "json_invalid":
            raise errors.MalformedBodyError(f"the body is not JSON: {item['msg']}") from None
        name = ".".join(map(str, item["loc"]))
        raise errors.InvalidOptionError(
            f'{name}: {item["msg"]}; send {{"name": "NAME", "path": "PATH"}}'
        ) from None
