"""Request bodies: read with a limit while they arrive, then taken apart off the event loop.

One image as it is (`image/*`), `multipart/form-data`, JSON with base64 or URLs, or a batch of raw
pixels as npy or safetensors.
"""

import binascii
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, NamedTuple

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import (
    BodyTooLargeError,
    InvalidOptionError,
    MalformedBodyError,
    MalformedImageError,
    TooManyImagesError,
    UnknownOptionError,
    UnsupportedBodyError,
)
from service.hints import nearest
from service.pixels import Pixels, read_npy, read_safetensors

IMAGE_TYPES = ("image/*", "application/octet-stream")
PIXEL_TYPES = ("application/x-npy", "application/x-safetensors")
REQUEST_TYPES = (*IMAGE_TYPES, "multipart/form-data", "application/json", *PIXEL_TYPES)
# base64 holds the interpreter lock for about 2 ms per MiB; between chunks others get a turn.
_BASE64_CHUNK = 4 * 65536


class BodyKind(NamedTuple):
    """How a body is to be read."""

    form: Literal["image", "multipart", "json", "npy", "safetensors"]
    boundary: bytes = b""


class ImageUrl(NamedTuple):
    """An image that is to be fetched."""

    url: str


ImageSource = bytes | Pixels | ImageUrl


class Payload(NamedTuple):
    """What a body holds."""

    images: Sequence[ImageSource]
    options: dict[str, Any]


def body_kind(content_type: str | None) -> BodyKind:
    """The form of body that a `Content-Type` announces.

    Raises:
        UnsupportedBodyError: none, or one that is not read here.
        MalformedBodyError: a multipart type without boundary.
    """
    media, parameters = parse_options_header(content_type)
    if media.startswith(b"image/") or media == b"application/octet-stream":
        return BodyKind("image")
    if media == b"application/json":
        return BodyKind("json")
    if media == b"application/x-npy":
        return BodyKind("npy")
    if media == b"application/x-safetensors":
        return BodyKind("safetensors")
    if media == b"multipart/form-data":
        if not parameters.get(b"boundary"):
            raise MalformedBodyError("multipart/form-data without a boundary in Content-Type")
        return BodyKind("multipart", parameters[b"boundary"])
    shown = f"content type {content_type[:80]!r}" if content_type else "no content type"
    raise UnsupportedBodyError(
        f"{shown}; send one of {', '.join(REQUEST_TYPES)} "
        "(with curl: -H 'Content-Type: image/jpeg' --data-binary @photo.jpg)"
    )


def check_encoding(content_encoding: str | None) -> None:
    """Refuse bodies that are compressed as a whole.

    Raises:
        UnsupportedBodyError: `Content-Encoding` names anything but `identity`.
    """
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise UnsupportedBodyError(
            f"Content-Encoding is {content_encoding[:40]!r}; send the body as it is: image files "
            "are compressed already"
        )


async def read_body(
    chunks: AsyncIterator[bytes],
    *,
    max_bytes: int,
    declared: str | None,
    waits: bool = False,
    take: Callable[[int], None] | None = None,
) -> bytes:
    """The whole body; refused by its declared length, or as soon as too much has arrived.

    Most clients read no answer before they have sent everything, and report a broken connection
    instead. So a body that is up to twice too large is received, but not kept, before it is
    refused.

    Args:
        max_bytes: Largest body that is taken.
        declared: `Content-Length` as sent.
        waits: The client waits for a go-ahead (`Expect: 100-continue`); it gets the refusal.
        take: Counts the bytes that are kept, before they are; of `HeldBodies.hold`.

    Raises:
        BodyTooLargeError: more than `max_bytes`.
        OverloadedError: `take` refuses.
    """
    num_bytes = int(declared[:20]) if declared is not None and declared.isdecimal() else 0
    if num_bytes > (max_bytes if waits else 2 * max_bytes):
        raise _too_large(num_bytes, max_bytes)
    received: list[bytes] = []
    num_bytes = 0
    async for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > 2 * max_bytes:
            break
        if num_bytes > max_bytes:
            received.clear()
        else:
            if take is not None:
                take(len(chunk))
            received.append(chunk)
    if num_bytes > max_bytes:
        raise _too_large(num_bytes, max_bytes)
    return b"".join(received)


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body has {num_bytes} bytes or more, {max_bytes} are allowed; "
        "send fewer or smaller images"
    )


def parse_payload(kind: BodyKind, body: bytes, *, max_images: int, max_lists: int) -> Payload:
    """Images and options of a body. Runs as long as the body is: call it off the event loop.

    Args:
        max_images: Most images.
        max_lists: Most lists in JSON, every box is one, and a quarter of its other values.

    Raises:
        MalformedBodyError, MalformedImageError, MalformedPixelsError, UnknownOptionError,
        InvalidOptionError, TooManyImagesError.
    """
    if not body:
        raise MalformedBodyError("the body is empty; send an image")
    if kind.form == "image":
        return Payload([body], {})
    if kind.form in ("npy", "safetensors"):
        read = read_npy if kind.form == "npy" else read_safetensors
        payload = Payload(read(body, max_images=max_images), {})
    elif kind.form == "json":
        payload = _parse_json(body, max_images, max_lists)
    else:
        payload = _parse_multipart(body, kind.boundary, max_images, max_lists)
    if not payload.images:
        raise MalformedBodyError("the request has no images; send at least one under 'images'")
    return payload


def _parse_json(body: bytes, max_images: int, max_lists: int) -> Payload:
    document = _load_object(body, "the body", max_lists)
    _check_keys(document, {"images", "options"}, "key")
    images = document.get("images", [])
    if not isinstance(images, list):
        raise MalformedBodyError('\'images\' is not a list; send [{"data": "<base64>"}]')
    _check_count(len(images), max_images)
    options = document.get("options", {})
    if not isinstance(options, dict):
        raise MalformedBodyError("'options' is not an object; send {\"size\": 448}")
    return Payload([_image_data(image, index) for index, image in enumerate(images)], options)


def _image_data(image: object, index: int) -> bytes | ImageUrl:
    if not isinstance(image, dict):
        raise MalformedBodyError(
            f'image {index} is not an object; send {{"data": "<base64>"}}', index=index
        )
    _check_keys(image, {"data", "url"}, f"key of image {index}")
    if "url" in image:
        if "data" in image or not isinstance(image["url"], str):
            raise MalformedBodyError(
                f"image {index} needs either base64 text as 'data' or text as 'url'", index=index
            )
        return ImageUrl(image["url"])
    text = image.get("data")
    if not isinstance(text, str):
        raise MalformedImageError(f"image {index} has no base64 text as 'data'", index=index)
    try:
        return b"".join(
            binascii.a2b_base64(text[start : start + _BASE64_CHUNK], strict_mode=True)
            for start in range(0, len(text), _BASE64_CHUNK)
        )
    except ValueError as error:  # binascii.Error, and text that is not ASCII
        raise MalformedImageError(f"image {index} is not base64: {error}", index=index) from error


class _Part:
    """One part of a multipart body while it is parsed."""

    def __init__(self) -> None:
        self.header = bytearray()
        self.value = bytearray()
        self.disposition = b""
        self.chunks: list[bytes] = []

    def end_header(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.disposition = bytes(self.value)
        self.header.clear()
        self.value.clear()

    @property
    def name(self) -> str:
        _, parameters = parse_options_header(self.disposition)
        return parameters.get(b"name", b"").decode("utf-8", "replace")


def _parse_multipart(body: bytes, boundary: bytes, max_images: int, max_lists: int) -> Payload:
    images: list[bytes] = []
    options: dict[str, Any] = {}
    part = _Part()
    num_options = 0
    is_complete = False

    def begin() -> None:
        nonlocal part
        part = _Part()

    def end() -> None:
        nonlocal options, num_options
        data = b"".join(part.chunks)
        if part.name == "images":
            _check_count(len(images) + 1, max_images)
            images.append(data)
        elif part.name == "options" and num_options == 0:
            num_options += 1
            options = _load_object(data, "the part 'options'", max_lists)
        elif part.name == "options":
            raise MalformedBodyError("the part 'options' is given twice; give it once")
        else:
            hint = nearest(part.name, ("images", "options"))
            raise UnknownOptionError(
                f"unknown part {part.name!r}: {hint}; options are JSON in the part 'options', or "
                "query parameters"
            )

    def finish() -> None:
        nonlocal is_complete
        is_complete = True

    def collect(target: Callable[[], bytearray]) -> Callable[[bytes, int, int], None]:
        return lambda data, start, stop: target().extend(data[start:stop])

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": lambda data, start, stop: part.chunks.append(data[start:stop]),
                "on_part_end": end,
                "on_header_field": collect(lambda: part.header),
                "on_header_value": collect(lambda: part.value),
                "on_header_end": lambda: part.end_header(),
                "on_end": finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedBodyError(f"the multipart body cannot be read: {error}") from error
    if not is_complete:
        raise MalformedBodyError("the multipart body ends before its last boundary")
    return Payload(images, options)


def _load_object(data: bytes, what: str, max_lists: int) -> dict[str, Any]:
    # Millions of small values hold the interpreter lock for a second and take a gigabyte; base64
    # has none of these marks.
    num_lists = data.count(b"[")
    if num_lists > max_lists:
        raise InvalidOptionError(
            f"{what} has {num_lists} lists, {max_lists} are allowed; ask for fewer boxes"
        )
    num_values = data.count(b",") + data.count(b"{")
    if num_values > 4 * max_lists:  # a box has four numbers
        raise InvalidOptionError(
            f"{what} has {num_values} values or more, {4 * max_lists} are allowed; ask for fewer "
            "boxes"
        )
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedBodyError(f"{what} is JSON, but not an object")
    return document


def _check_keys(document: dict[str, Any], valid: set[str], what: str) -> None:
    for name in document.keys() - valid:
        raise UnknownOptionError(f"unknown {what} {name[:80]!r}: {nearest(name, valid)}")


def _check_count(num_images: int, max_images: int) -> None:
    if num_images > max_images:
        raise TooManyImagesError(
            f"the request has {num_images} images or more, {max_images} are allowed; "
            "send them in several requests"
        )
