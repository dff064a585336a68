"""What `/info` says: the models, the limits, and what may be asked for."""

from importlib import metadata
from typing import get_args

from backbone.preprocess import supported_formats
from service import schemas, wire
from service.bodies import REQUEST_TYPES
from service.boxes import MAX_BOX_SIZE
from service.lifecycle import FeatureService
from service.models import ServedModel
from service.negotiation import MEDIA_TYPES
from service.options import MAX_POOL, Dtype, Include, Layout

_VERSIONS = ("torch", "torchvision", "timm", "pillow", "safetensors", "fastapi")


def project_version() -> str:
    """Version of the installed project; a checkout that is not installed says so."""
    try:
        return metadata.version("vit-refinery")
    except metadata.PackageNotFoundError:
        return "0+checkout"


def describe(service: FeatureService) -> schemas.Info:
    """What `/info` says.

    Raises:
        NotReadyError: the models are not loaded and warmed up yet.
    """
    if service.phase == "starting" or not service.registry.models:
        service.check_accepting()
    settings = service.settings
    models = [describe_model(model) for model in service.registry.models]
    warm_up = service.registry.find(None).warm_up
    return schemas.Info(
        version=project_version(),
        model=models[0],
        models=models,
        limits=schemas.LimitsInfo(
            max_body_bytes=settings.max_body_bytes,
            max_header_bytes=settings.max_header_bytes,
            max_response_bytes=settings.max_response_bytes,
            max_images=settings.max_images,
            max_image_pixels=settings.max_image_pixels,
            max_image_tokens=settings.max_image_tokens,
            max_size=settings.max_size,
            only_buckets=settings.only_buckets,
            max_layers=settings.max_layers,
            max_feature_bytes=settings.max_feature_bytes,
            max_image_boxes=settings.max_image_boxes,
            max_box_vectors=settings.max_box_vectors,
            max_box_size=MAX_BOX_SIZE,
            max_pool=MAX_POOL,
            batch_tokens=settings.batch_tokens,
            max_queue_tokens=service.admission.limit,
            max_json_values=wire.MAX_JSON_VALUES,
            request_seconds=settings.request_seconds,
            body_seconds=settings.body_seconds,
            header_seconds=settings.header_seconds,
            url_hosts=list(settings.allow_url_hosts),
        ),
        image_formats=list(supported_formats()),
        request_types=list(REQUEST_TYPES),
        response_types=list(MEDIA_TYPES),
        dtypes=list(get_args(Dtype)),
        layouts=list(get_args(Layout)),
        includes=list(get_args(Include)),
        cache=settings.cache.partition("://")[0],
        tolerance=schemas.Tolerance(
            max_relative_error=warm_up.max_relative_error,
            min_cosine=warm_up.min_cosine,
            measured_relative_error=warm_up.measured_relative_error,
            measured_cosine=warm_up.measured_cosine,
        ),
        versions={name: metadata.version(name) for name in _VERSIONS},
    )


def describe_loaded(model: ServedModel) -> schemas.LoadedModelInfo:
    """What is said about one model to those who may load others: where it lies, too."""
    return schemas.LoadedModelInfo(spec=model.spec, **describe_model(model).model_dump())


def describe_model(model: ServedModel) -> schemas.ModelInfo:
    """What is said about one model."""
    encoder = model.encoder
    return schemas.ModelInfo(
        name=model.name,
        backbone=encoder.backbone.name,
        digest=encoder.digest,
        is_refined=encoder.manifest is not None,
        patch_size=encoder.patch_size,
        embed_dim=encoder.backbone.embed_dim,
        num_layers=encoder.backbone.depth,
        native_size=encoder.native_size,
        buckets=[f"{height}x{width}" for height, width in model.buckets],
        register_width=encoder.register_width(*encoder.native_size),
        precision=encoder.precision,
        devices=[str(each.device) for each in model.encoders],
    )
