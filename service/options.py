"""Options of `POST /features`: read from query parameters and from the body, and checked."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.boxes import MAX_BOX_SIZE, Box, BoxLimits, read_boxes
from service.errors import (
    InvalidOptionError,
    ServiceError,
    TooManyLayersError,
    UnknownOptionError,
)
from service.hints import nearest

Dtype = Literal["float16", "float32", "bfloat16", "int8"]
Layout = Literal["grid", "tokens", "nchw"]
Include = Literal["registers", "cls", "spurious"]
CacheUse = Literal["default", "bypass", "refresh"]

MAX_POOL = 64
_NUMBERS = ("box_size", "project", "register_width", "pool")
_LISTS = ("size", "layers")
_SWITCHES = ("normalize", "partial")
_REPEATED = ("layers", "boxes", "include")
_MAX_NUMBER_LENGTH = 40
# All options without `boxes`, as JSON: far more than any of them needs.
_MAX_OPTIONS_BYTES = 16384
_NESTED_LIST = re.compile(r"\s*\[\s*\[")
_TRUE, _FALSE = ("true", "1"), ("false", "0")


class FeatureOptions(BaseModel):
    """Options of `POST /features`: query parameters, or the JSON object `options` of the body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = Field(
        None, max_length=64, description="name of the model; default the first that is served"
    )
    size: Annotated[int, Field(ge=1)] | tuple[int, int] | None = Field(
        None,
        description="pixels that images are resized to: `[height, width]`, whole patches, or the "
        "longest side; default the model's native size",
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        (-1,), description="block numbers; negative ones count from the end"
    )
    dtype: Dtype = Field(
        "float16",
        description="number format of the features; int8 comes with a float32 scale per vector, "
        "value = int8 * scale",
    )
    layout: Layout = Field(
        "grid",
        description="shape of an image's features: [h, w, C], [h*w, C] or [1, C, h, w]; of its "
        "boxes: [K, p, p, C], [K, p*p, C] or [K, C, p, p] with p = box_size, and [K, C] with "
        "box_size 1; of the mean over all patches: [C]",
    )
    normalize: bool = Field(False, description="scale every vector to unit length")
    pool: Literal["none", "mean"] | Annotated[int, Field(ge=1, le=MAX_POOL)] = Field(
        "none",
        description="average patches before they are sent: `mean` over all of them, or a factor, "
        "over squares of so many patches a side (those at the edges may hold fewer)",
    )
    project: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="send the first so many principal components of the image's own patches "
        "instead of the channels, and the basis and mean that undo it",
    )
    include: tuple[Include, ...] = Field(
        (),
        description="also send the register tokens, the class and native register tokens (cls), "
        "or how spurious each patch token is (highest cosine to a register token; z-score of its "
        "length)",
    )
    register_width: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None, description="width of the register border in patches; default the model's own rule"
    )
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
    cache: CacheUse = Field(
        "default",
        description="bypass: neither look into the cache nor fill it; refresh: compute anew and "
        "fill it",
    )
    partial: bool = Field(
        False,
        description="answer with what could be done, and list the images that failed with their "
        "errors, instead of failing as a whole",
    )

    def shaping(self) -> dict[str, Any]:
        """The options that decide how a model's features become the answer."""
        names = {"dtype", "layout", "normalize", "pool", "project", "include", "boxes", "box_size"}
        return self.model_dump(mode="json", include=names)


class OptionLimits(NamedTuple):
    """What a request may ask for at most."""

    max_layers: int
    boxes: BoxLimits


def parse_options(
    query: Iterable[tuple[str, str]],
    body: Mapping[str, Any] | None = None,
    *,
    num_images: int,
    limits: OptionLimits,
) -> FeatureOptions:
    """Options from query parameters and from the body.

    Args:
        query: Names and texts.
        body: The JSON object `options`.
        num_images: Images of the request; `boxes` has a list for each.
        limits: What may be asked for at most.

    Raises:
        UnknownOptionError: a name that is no option.
        InvalidOptionError: a value that is not possible, or an option given twice.
        TooManyLayersError, TooManyBoxesError: more than the limits.
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
    if len(options.layers) > limits.max_layers:
        raise TooManyLayersError(
            f"the request asks for {len(options.layers)} layers, {limits.max_layers} are allowed; "
            "ask for the others in another request"
        )
    if boxes is None:
        if "box_size" in values:
            raise InvalidOptionError(
                "option 'box_size' is given without 'boxes'; give both or none"
            )
        return options
    for name in ("pool", "project"):
        if name in values and values[name] != "none":
            raise InvalidOptionError(
                f"option {name!r} is about patches and the request asks for boxes; give one of both"
            )
    # Not by pydantic: there may be very many, which are to be counted first and read only once.
    read = read_boxes(
        boxes,
        num_images=num_images,
        vectors_per_box=options.box_size**2 * len(options.layers),
        limits=limits.boxes,
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
        options = FeatureOptions.model_validate_json(text)
    except (ValidationError, orjson.JSONEncodeError) as error:
        raise _option_error(error) from None
    if len(set(options.include)) < len(options.include):
        raise InvalidOptionError(f"option 'include' names one twice: {list(options.include)}")
    return options


def _from_text(name: str, text: str) -> Any:
    """A query parameter's value; what cannot be read stays text, and validation says so."""
    if name == "boxes" and _NESTED_LIST.match(text):
        return _nested_boxes(text)
    if name == "boxes":
        sides = [_as_number(part.strip()) for part in _without_brackets(text).split(",")]
        return [sides[start : start + 4] for start in range(0, len(sides), 4)]
    if name == "include":
        return [part.strip().strip('"') for part in _without_brackets(text).split(",")]
    if name in _NUMBERS and _is_integer(text):
        return int(text)
    if name in _LISTS:
        # 448x672 is how buckets are written.
        numbers = _as_list(text.replace("x", ",") if name == "size" else text)
        return numbers[0] if name == "size" and len(numbers) == 1 and "[" not in text else numbers
    if name in _SWITCHES and text.lower() in _TRUE + _FALSE:
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
    if item["type"] == "literal_error" and name in _CHOICES:
        return InvalidOptionError(f"option {name!r} is {shown}: {nearest(shown, _CHOICES[name])}")
    if name in _WANTED:
        return InvalidOptionError(f"option {name!r} is {shown}; wanted: {_WANTED[name]}")
    wanted = FeatureOptions.model_fields[name].description
    return InvalidOptionError(f"option {name!r} is {shown}: {item['msg']}; wanted: {wanted}")


_CHOICES = {
    "dtype": get_args(Dtype),
    "layout": get_args(Layout),
    "include": get_args(Include),
    "cache": get_args(CacheUse),
}
# Where pydantic would speak of one alternative alone.
_WANTED = {
    "pool": f"none, mean, or a factor from 1 to {MAX_POOL}",
    "size": "the longest side in pixels, or height and width: 448, or 448,672 as query parameter "
    "and [448, 672] in JSON",
}
_DEFAULT_OPTIONS = FeatureOptions()
