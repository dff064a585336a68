"""What the OpenAPI document says of `POST /features`, and what `/info` and the probes answer."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.bodies import IMAGE_TYPES, PIXEL_TYPES
from service.options import FeatureOptions

_HEADERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "x-deadline-ms",
        "milliseconds after which nobody waits for the answer any more",
        {"type": "integer", "minimum": 1},
    ),
    ("x-request-id", "name of the request in answer and log", {"type": "string"}),
    ("if-none-match", "ETag of an answer that the client has", {"type": "string"}),
)
# OpenAPI of what is written otherwise in the query than in the body.
_IN_QUERY = {"boxes": {"type": "array", "items": {"type": "number"}, "minItems": 4}}


def describe_request() -> dict[str, Any]:
    """OpenAPI of the parameters and the body, which the route of /features reads by hand."""
    options = FeatureOptions.model_json_schema()
    binary = {"type": "string", "format": "binary"}
    encoded = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "data": {"type": "string", "contentEncoding": "base64"},
            "url": {"type": "string", "format": "uri"},
        },
        "oneOf": [{"required": ["data"]}, {"required": ["url"]}],
    }

    def several(item: dict[str, Any]) -> dict[str, Any]:
        return {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {"type": "array", "items": item, "minItems": 1},
                    "options": options,
                },
            }
        }

    content: dict[str, Any] = {media: {"schema": binary} for media in (*IMAGE_TYPES, *PIXEL_TYPES)}
    content["multipart/form-data"] = several(binary)
    content["application/json"] = several(encoded)
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": _IN_QUERY.get(name, schema),
            "explode": False,
        }
        for name, schema in options["properties"].items()
    ]
    parameters += [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": description,
            "schema": schema,
        }
        for name, description, schema in _HEADERS
    ]
    return {
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
    }


class ModelInfo(BaseModel):
    """The model that is served."""

    name: str = Field(description="for the option `model`")
    backbone: str
    digest: str = Field(description="SHA-256 of the weights")
    is_refined: bool = Field(description="false: a raw backbone, served without register border")
    patch_size: int
    embed_dim: int
    num_layers: int
    native_size: tuple[int, int] = Field(description="default size, (height, width) in pixels")
    buckets: list[str] = Field(description="sizes made ready, HEIGHTxWIDTH in pixels")
    register_width: int = Field(description="border in patches at the native size")
    precision: str = Field(description="fp32 or bf16, what --precision came to")
    devices: list[str]


class LoadedModelInfo(ModelInfo):
    """A model as an operator sees it."""

    spec: str = Field(description="what was loaded")


class LimitsInfo(BaseModel):
    """What a request may not exceed."""

    max_body_bytes: int
    max_header_bytes: int
    max_response_bytes: int = Field(description="features in one answer; of frames, in one frame")
    max_images: int
    max_image_pixels: int
    max_image_tokens: int
    max_size: int = Field(description="longest side of `size`, px; the shortest is a patch")
    only_buckets: bool = Field(description="other sizes than the models' buckets are refused")
    max_layers: int
    max_feature_bytes: int = Field(description="images x layers x patches x channels of a request")
    max_image_boxes: int
    max_box_vectors: int = Field(description="boxes x box_size x box_size x layers of a request")
    max_box_size: int
    max_pool: int
    batch_tokens: int
    max_queue_tokens: int = Field(description="tokens that may wait; it follows the measured rate")
    max_json_values: int
    request_seconds: float
    body_seconds: float
    header_seconds: float
    url_hosts: list[str] = Field(description="hosts that images may be fetched from")


class Tolerance(BaseModel):
    """How far an image's features may depend on the images that share its batch.

    Relative error of a token: Euclidean distance over length. Asked again under the same load
    of one, an image gets the same bytes.
    """

    max_relative_error: float = Field(description="bound on the relative error of any token")
    min_cosine: float = Field(description="bound on the cosine of any token")
    measured_relative_error: float = Field(description="the largest one met in warm-up")
    measured_cosine: float = Field(description="the smallest one met in warm-up")


class Info(BaseModel):
    """Answer of `GET /info`."""

    version: str
    model: ModelInfo = Field(description="the default one")
    models: list[ModelInfo]
    limits: LimitsInfo
    image_formats: list[str]
    request_types: list[str]
    response_types: list[str]
    dtypes: list[str]
    layouts: list[str]
    includes: list[str]
    cache: str = Field(description="memory, redis, rediss or off")
    tolerance: Tolerance
    versions: dict[str, str]


class Health(BaseModel):
    """Answer of the probes."""

    status: Literal["ok"] = "ok"
