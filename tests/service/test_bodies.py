import asyncio
import base64
import json

import pytest

from service import bodies, errors
from service.bodies import BodyKind, body_kind, parse_payload, read_body

JSON = BodyKind("json")
MULTIPART = BodyKind("multipart", b"frontier")


def multipart(*parts, boundary=b"frontier"):
    body = b""
    for name, data in parts:
        body += b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name + b'"; '
        body += b'filename="f"\r\nContent-Type: image/png\r\n\r\n' + data + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


def in_json(*images, **rest):
    items = [{"data": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"images": items} | rest).encode()


async def chunks(*parts):
    for part in parts:
        yield part


def read(*parts, max_bytes=10, declared=None, **options):
    return asyncio.run(read_body(chunks(*parts), max_bytes=max_bytes, declared=declared, **options))


def parse(kind, body, *, max_images, max_lists=100_000):
    return parse_payload(kind, body, max_images=max_images, max_lists=max_lists)


@pytest.mark.parametrize(
    ("content_type", "form"),
    [
        ("image/jpeg", "image"),
        ("IMAGE/PNG; q=1", "image"),
        ("application/octet-stream", "image"),
        ("application/json; charset=utf-8", "json"),
        ("multipart/form-data; boundary=frontier", "multipart"),
    ],
)
def test_the_content_type_chooses_the_form(content_type, form):
    assert body_kind(content_type).form == form


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "image", "\xff"]
)
def test_other_content_types_are_refused_with_those_that_work(content_type):
    with pytest.raises(errors.UnsupportedBodyError, match="multipart/form-data"):
        body_kind(content_type)


def test_multipart_needs_a_boundary():
    with pytest.raises(errors.MalformedBodyError, match="boundary"):
        body_kind("multipart/form-data")


def test_a_body_is_read_whole():
    assert read(b"abc", b"", b"defg") == b"abcdefg"
    assert read(b"a" * 10, declared="10") == b"a" * 10


@pytest.mark.parametrize(("declared", "waits"), [("21", False), ("9" * 50, False), ("11", True)])
def test_a_declared_length_is_refused_before_anything_is_read(declared, waits):
    async def never():
        raise AssertionError("the body was read")
        yield b""

    with pytest.raises(errors.BodyTooLargeError):
        asyncio.run(read_body(never(), max_bytes=10, declared=declared, waits=waits))


@pytest.mark.parametrize("declared", [None, "14", "nonsense"])
def test_a_body_that_is_little_too_large_is_received_and_refused(declared):
    with pytest.raises(errors.BodyTooLargeError, match="14 bytes"):
        read(b"a" * 7, b"b" * 7, declared=declared)


def test_a_body_without_end_is_refused_while_it_arrives():
    taken = []

    async def endless():
        while True:
            taken.append(1)
            yield b"abcd"

    with pytest.raises(errors.BodyTooLargeError):
        asyncio.run(read_body(endless(), max_bytes=10, declared=None))
    assert len(taken) == 6


def test_an_image_body_is_the_image():
    assert parse(BodyKind("image"), b"jpeg", max_images=1) == ([b"jpeg"], {})


def test_multipart_holds_images_in_order_and_options():
    tricky = b"\r\n--frontie\r\n--fron\r\r\n--"
    body = multipart((b"images", b"one"), (b"options", b'{"size": 64}'), (b"images", tricky))

    payload = parse(MULTIPART, body, max_images=2)

    assert payload.images == [b"one", tricky]
    assert payload.options == {"size": 64}


def test_json_holds_base64_images_and_options():
    large = bytes(range(256)) * 3000  # several chunks

    payload = parse(JSON, in_json(b"one", large, options={"size": 64}), max_images=2)

    assert payload.images == [b"one", large]
    assert payload.options == {"size": 64}


@pytest.mark.parametrize("kind", [JSON, MULTIPART])
def test_more_images_than_allowed_are_refused(kind):
    body = in_json(b"a", b"b") if kind is JSON else multipart((b"images", b"a"), (b"images", b"b"))

    with pytest.raises(errors.TooManyImagesError, match="2 images or more, 1 are allowed"):
        parse(kind, body, max_images=1)


@pytest.mark.parametrize(
    ("kind", "body", "error", "message"),
    [
        (BodyKind("image"), b"", errors.MalformedBodyError, "empty"),
        (JSON, b"{", errors.MalformedBodyError, "not JSON"),
        (JSON, b"[]", errors.MalformedBodyError, "not an object"),
        (JSON, b"[" * 100_000, errors.MalformedBodyError, "not JSON"),
        (JSON, b"{}", errors.MalformedBodyError, "no images"),
        (JSON, b'{"images": []}', errors.MalformedBodyError, "no images"),
        (JSON, b'{"images": {}}', errors.MalformedBodyError, "not a list"),
        (JSON, b'{"images": ["aGk="]}', errors.MalformedBodyError, "image 0 is not an object"),
        (JSON, b'{"images": [{"data": 3}]}', errors.MalformedImageError, "image 0"),
        (JSON, b'{"images": [{"data": "a#k="}]}', errors.MalformedImageError, "not base64"),
        (JSON, '{"images": [{"data": "ü"}]}'.encode(), errors.MalformedImageError, "base64"),
        (JSON, b'{"image": []}', errors.UnknownOptionError, "did you mean 'images'"),
        (JSON, b'{"images": [{"date": ""}]}', errors.UnknownOptionError, "did you mean 'data'"),
        (JSON, in_json(b"a", options=[]), errors.MalformedBodyError, "'options' is not an obj"),
        (MULTIPART, b"junk", errors.MalformedBodyError, "multipart"),
        (MULTIPART, multipart(), errors.MalformedBodyError, "no images"),
        (MULTIPART, multipart((b"image", b"a")), errors.UnknownOptionError, "mean 'images'"),
        (MULTIPART, multipart((b"images", b"a"))[:-20], errors.MalformedBodyError, "ends before"),
        (MULTIPART, multipart((b"options", b"{")), errors.MalformedBodyError, "'options' is not"),
        (
            MULTIPART,
            multipart((b"options", b"{}"), (b"options", b"{}")),
            errors.MalformedBodyError,
            "twice",
        ),
    ],
)
def test_a_broken_body_is_refused_with_its_fault(kind, body, error, message):
    with pytest.raises(error, match=message):
        parse(kind, body, max_images=4)


def test_a_bad_image_in_json_is_named():
    body = b'{"images": [{"data": "aGk="}, {"data": "!"}]}'

    with pytest.raises(errors.MalformedImageError) as caught:
        parse(JSON, body, max_images=4)
    assert caught.value.index == 1


@pytest.mark.parametrize("kind", [JSON, MULTIPART])
def test_a_body_of_too_many_lists_is_refused_before_it_is_loaded(kind):
    def body(num_lists):
        boxes = [[0, 0, 1, 1]] * (num_lists - 1)
        if kind is JSON:
            return in_json(b"a", options={"boxes": boxes[1:]})
        options = json.dumps({"boxes": boxes}).encode()
        return multipart((b"images", b"a"), (b"options", options))

    with pytest.raises(errors.InvalidOptionError, match="11 lists, 10 are allowed"):
        parse(kind, body(11), max_images=1, max_lists=10)
    assert parse(kind, body(10), max_images=1, max_lists=10).images == [b"a"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"images": [' + b"{}," * 50 + b"{}]}",
        b'{"images": [' + b'"aa",' * 50 + b'"aa"]}',
        b'{"options": {' + b",".join(b'"%d": 0' % number for number in range(51)) + b"}}",
    ],
)
def test_a_body_of_too_many_small_values_is_refused_before_it_is_loaded(body, monkeypatch):
    monkeypatch.setattr(bodies.orjson, "loads", None)

    with pytest.raises(errors.InvalidOptionError, match="40 are allowed"):
        parse(JSON, body, max_images=1, max_lists=10)


def test_as_many_boxes_as_lists_are_allowed_are_read():
    options = {"boxes": [[0.5, 0.5, 1.5, 1.5]] * 1000}

    payload = parse(JSON, in_json(b"a", options=options), max_images=1, max_lists=1016)

    assert payload.options == options


def test_what_counts_the_bytes_of_a_body_may_refuse_them():
    taken = []

    def take(num_bytes):
        if sum(taken) + num_bytes > 8:
            raise errors.OverloadedError("full")
        taken.append(num_bytes)

    assert read(b"abcd", b"efgh", max_bytes=100, take=take) == b"abcdefgh"
    assert taken == [4, 4]
    with pytest.raises(errors.OverloadedError):
        read(b"i", max_bytes=100, take=take)
