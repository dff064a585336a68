"""What a request may ask for and what `/info` says."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.boxes import MAX_BOX_SIZE, Box, BoxLimits, read_boxes
from service.errors import InvalidOptionError, ServiceError, UnknownOptionError
from service.hints import nearest

Dtype = Literal["float16", "float32"]
Layout = Literal["grid", "tokens", "nchw"]

_LISTS = ("size", "layers")
_REPEATED = ("layers", "boxes")
# OpenAPI of what is written otherwise in the query than in the body.
_IN_QUERY = {"boxes": {"type": "array", "items": {"type": "number"}, "minItems": 4}}
_MAX_NUMBER_LENGTH = 40
# All options without `boxes`, as JSON: far more than any of them needs.
_MAX_OPTIONS_BYTES = 16384
_NESTED_LIST = re.compile(r"\s*\[\s*\[")
_TRUE, _FALSE = ("true", "1"), ("false", "0")


class FeatureOptions(BaseModel):
    """Options of `POST /features`: query parameters, or the JSON object `options` of the body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: Annotated[int, Field(ge=1)] | tuple[int, int] | None = Field(
        None,
        description="pixels that images are resized to: `[height, width]`, whole patches, or the "
        "longest side; default the model's native size",
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        (-1,), description="block numbers; negative ones count from the end"
    )
    dtype: Dtype = Field("float16", description="number format of the features")
    layout: Layout = Field(
        "grid",
        description="shape of an image's features: [h, w, C], [h*w, C] or [1, C, h, w]; of its "
        "boxes: [K, p, p, C], [K, p*p, C] or [K, C, p, p] with p = box_size, and [K, C] with "
        "box_size 1",
    )
    normalize: bool = Field(False, description="scale every vector to unit length")
    boxes: tuple[tuple[Box, ...], ...] | None = Field(
        None,
        description="answer with features of boxes (ROI-align) instead of the patch grid: for "
        "each image a list of `[x0, y0, x1, y1]` in pixels of the image as sent and upright. For "
        "one image also a flat list of boxes; as query parameter `x0,y0,x1,y1`, several in one or "
        "repeated, or JSON. What lies outside of the image counts as zeros, and an empty box gives "
        "zeros; a box may reach beyond the image as far as that is large; one turned inside out is "
        "refused",
    )
    box_size: Annotated[int, Field(ge=1, le=MAX_BOX_SIZE)] = Field(
        1, description="vectors of a box on each side; 1: one vector for each box"
    )


def parse_options(
    query: Iterable[tuple[str, str]],
    body: Mapping[str, Any] | None = None,
    *,
    num_images: int,
    box_limits: BoxLimits,
) -> FeatureOptions:
    """Options from query parameters and from the body.

    Args:
        query: Names and texts.
        body: The JSON object `options`.
        num_images: Images of the request; `boxes` has a list for each.
        box_limits: What the boxes may come to.

    Raises:
        UnknownOptionError: a name that is no option.
        InvalidOptionError: a value that is not possible, or an option given twice.
    """
    values: dict[str, Any] = {}
    for name, text in query:
        if name in values and name in _REPEATED:
            values[name] += _from_text(name, text)
        elif name in values:
            raise InvalidOptionError(f"option {name!r} is given twice; give it once")
        else:
            values[name] = _from_text(name, text)
    for name, value in (body or {}).items():
        if name in values:
            raise InvalidOptionError(
                f"option {name!r} is given both in the query and in the body; give it once"
            )
        values[name] = value
    if not values:
        return _DEFAULT_OPTIONS
    boxes = values.pop("boxes", None)
    options = _validated(values)
    if boxes is None:
        if "box_size" in values:
            raise InvalidOptionError(
                "option 'box_size' is given without 'boxes'; give both or none"
            )
        return options
    # Not by pydantic: there may be very many, which are to be counted first and read only once.
    read = read_boxes(
        boxes,
        num_images=num_images,
        vectors_per_box=options.box_size**2 * len(options.layers),
        limits=box_limits,
    )
    return options.model_copy(update={"boxes": read})


def _validated(values: Mapping[str, Any]) -> FeatureOptions:
    try:
        text = orjson.dumps(values)
        if len(text) > _MAX_OPTIONS_BYTES:
            raise InvalidOptionError(
                f"the options besides 'boxes' are {len(text)} bytes of JSON, {_MAX_OPTIONS_BYTES} "
                "are allowed; shorten the longest, such as 'layers'"
            )
        # Through JSON, so that strict validation still takes a list for a tuple.
        return FeatureOptions.model_validate_json(text)
    except (ValidationError, orjson.JSONEncodeError) as error:
        raise _option_error(error) from None


def _from_text(name: str, text: str) -> Any:
    """A query parameter's value; what cannot be read stays text, and validation says so."""
    if name == "boxes" and _NESTED_LIST.match(text):
        return _nested_boxes(text)
    if name == "boxes":
        sides = [_as_number(part.strip()) for part in _without_brackets(text).split(",")]
        return [sides[start : start + 4] for start in range(0, len(sides), 4)]
    if name == "box_size" and _is_integer(text):
        return int(text)
    if name in _LISTS:
        numbers = _as_list(text)
        return numbers[0] if name == "size" and len(numbers) == 1 and "[" not in text else numbers
    if name == "normalize" and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    return text


def _nested_boxes(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidOptionError(
            f"option 'boxes' is {text[:80]!r}, which begins like JSON but is none: {error}; write "
            "x0,y0,x1,y1 for each box, or [[x0,y0,x1,y1]]"
        ) from None


def _as_list(text: str) -> list[int | str]:
    parts = _without_brackets(text).split(",")
    return [int(part) if _is_integer(part.strip()) else part.strip() for part in parts]


def _without_brackets(text: str) -> str:
    return text.strip().removeprefix("[").removesuffix("]")


def _as_number(text: str) -> float | str:
    if len(text) > _MAX_NUMBER_LENGTH:
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _is_integer(text: str) -> bool:
    # At most nine digits: beyond that no option has a meaning, and int() has a cost.
    return text.removeprefix("-").isdecimal() and text.isascii() and len(text) <= 10


def _option_error(error: ValidationError | orjson.JSONEncodeError) -> ServiceError:
    if not isinstance(error, ValidationError):
        return InvalidOptionError(f"the options cannot be read: {error}")
    item = error.errors()[0]
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        hint = nearest(name, FeatureOptions.model_fields)
        return UnknownOptionError(f"unknown option {name!r}: {hint}")
    shown = repr(item["input"])[:80]
    choices = get_args(FeatureOptions.model_fields[name].annotation)
    if item["type"] == "literal_error":
        return InvalidOptionError(f"option {name!r} is {shown}: {nearest(shown, choices)}")
    wanted = FeatureOptions.model_fields[name].description
    return InvalidOptionError(f"option {name!r} is {shown}: {item['msg']}; wanted: {wanted}")


_DEFAULT_OPTIONS = FeatureOptions()


def describe_request(image_types: Sequence[str]) -> dict[str, Any]:
    """OpenAPI of the parameters and the body, which the route of /features reads by hand."""
    options = FeatureOptions.model_json_schema()
    image = {"type": "string", "format": "binary"}
    encoded = {
        "type": "object",
        "required": ["data"],
        "additionalProperties": False,
        "properties": {"data": {"type": "string", "contentEncoding": "base64"}},
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

    content: dict[str, Any] = {media: {"schema": image} for media in image_types}
    content["multipart/form-data"] = several(image)
    content["application/json"] = several(encoded)
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema["description"],
                "schema": _IN_QUERY.get(name, schema),
                "explode": False,
            }
            for name, schema in options["properties"].items()
        ],
        "requestBody": {"required": True, "content": content},
    }


class ModelInfo(BaseModel):
    """The model that is served."""

    name: str = Field(description="what --model said")
    backbone: str
    digest: str = Field(description="SHA-256 of the weights")
    is_refined: bool = Field(description="false: a raw backbone, served without register border")
    patch_size: int
    embed_dim: int
    num_layers: int
    native_size: tuple[int, int] = Field(description="default size, (height, width) in pixels")
    register_width: int = Field(description="border in patches at the native size")
    precision: str = Field(description="fp32 or bf16, what --precision came to")
    devices: list[str]


class LimitsInfo(BaseModel):
    """What a request may not exceed."""

    max_body_bytes: int
    max_images: int
    max_image_pixels: int
    max_image_tokens: int
    max_image_boxes: int
    max_box_vectors: int = Field(description="boxes x box_size x box_size x layers of a request")
    max_box_size: int
    batch_tokens: int
    max_json_values: int


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
    model: ModelInfo
    limits: LimitsInfo
    image_formats: list[str]
    request_types: list[str]
    response_types: list[str]
    dtypes: list[str]
    layouts: list[str]
    tolerance: Tolerance
    versions: dict[str, str]


class Health(BaseModel):
    """Answer of the probes."""

    status: Literal["ok"] = "ok"
