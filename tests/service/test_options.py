import re
import time

import pytest

from service.boxes import BoxLimits
from service.errors import (
    InvalidOptionError,
    TooManyBoxesError,
    TooManyLayersError,
    UnknownOptionError,
)
from service.options import FeatureOptions, OptionLimits, parse_options


def parse(query, body=None, num_images=1):
    limits = OptionLimits(3, BoxLimits(max_image_boxes=1000, max_vectors=10_000))
    return parse_options(query, body, num_images=num_images, limits=limits)


def test_without_options_the_defaults_hold():
    assert parse([]) == FeatureOptions()


@pytest.mark.parametrize(
    ("text", "size"), [("448", 448), ("224,336", (224, 336)), ("[224, 336]", (224, 336))]
)
def test_sizes_read_the_same_from_query_and_body(text, size):
    body = {"size": list(size) if isinstance(size, tuple) else size}

    assert parse([("size", text)]).size == parse([], body).size == size


@pytest.mark.parametrize(
    "query",
    [[("layers", "-1,-4")], [("layers", "[-1,-4]")], [("layers", "-1"), ("layers", "-4")]],
)
def test_layers_may_be_listed_or_repeated(query):
    assert parse(query).layers == (-1, -4)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False)])
def test_switches_read_as_words_or_digits(text, value):
    assert parse([("normalize", text)]).normalize is value


def test_query_and_body_are_joined():
    options = parse([("dtype", "float32")], {"layout": "nchw"})

    assert (options.dtype, options.layout) == ("float32", "nchw")


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownOptionError, match="'normalise': did you mean 'normalize'"):
        parse([("normalise", "1")])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"layout": 3}, "valid are grid, nchw, tokens"),
        ({"normalize": "true"}, "valid boolean"),
        ({"normalize": 1}, "valid boolean"),
        ({"layers": []}, "at least 1 item"),
        ({"layers": [1.5]}, "layers"),
        ({"layers": "x"}, "layers"),
        ({"size": 0}, "size"),
        ({"size": [224]}, "size"),
        ({"size": [224, 224, 3]}, "size"),
        ({"size": "big"}, "size"),
        ({"size": True}, "size"),
        ({"layers": [0] * 3_000_000}, "bytes of JSON, 16384 are allowed"),
        ({"dtype": {"a": [[]] * 20_000}}, "bytes of JSON"),
        ({"size": 10**400}, "cannot be read"),
        ({"dtype": "\ud800"}, "cannot be read"),
    ],
)
def test_an_impossible_value_is_refused_by_name(body, message):
    with pytest.raises(InvalidOptionError, match=message):
        parse([], body)


@pytest.mark.parametrize("text", ["", "x", "1,x", "9" * 5000, "٣", "1.5", "[[1]]", "--1"])
def test_sizes_that_are_no_numbers_are_refused(text):
    with pytest.raises(InvalidOptionError):
        parse([("size", text)])


def test_an_option_given_twice_is_refused():
    with pytest.raises(InvalidOptionError, match="twice"):
        parse([("dtype", "float16"), ("dtype", "float32")])
    with pytest.raises(InvalidOptionError, match="both in the query and in the body"):
        parse([("dtype", "float16")], {"dtype": "float16"})


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 3, 4]] * 3_000_000, "image 0 has 3000000 boxes, 1000 are allowed"),
        ([[[1, 2, 3, 4]] * 3_000_000], "image 0 has 3000000 boxes, 1000 are allowed"),
        ([[]] * 3_000_000, "lists of boxes: 3000000, images: 1"),
        ([[[]] * 3_000_000], "image 0 has 3000000 boxes"),
        ([[[0] * 3_000_000]], "box 0 of image 0 is [0, 0, 0, 0, 0, 0, ...], not 4 finite numbers"),
        ([[{str(key): key for key in range(100_000)}]], "box 0 of image 0 is [{...}]"),
    ],
    ids=["flat", "nested", "empty lists", "empty boxes", "a long box", "an object"],
)
def test_very_many_boxes_are_refused_before_they_are_read(boxes, message):
    started = time.thread_time()

    with pytest.raises((InvalidOptionError, TooManyBoxesError), match=re.escape(message)):
        parse([], {"boxes": boxes})

    # A thousandth of a second here; a single pass over them takes a tenth, validating them seconds.
    assert time.thread_time() - started < 0.05


def test_boxes_of_all_images_are_counted_with_box_size_and_layers():
    three = [[0, 0, 9, 9]] * 3
    options = {"boxes": [three, three], "box_size": 40}

    assert parse([], options, num_images=2).boxes == (((0.0, 0.0, 9.0, 9.0),) * 3,) * 2
    with pytest.raises(TooManyBoxesError, match="19200 vectors .* 10000 are allowed"):
        parse([], options | {"layers": [0, 1]}, num_images=2)


@pytest.mark.parametrize(
    ("query", "name", "value"),
    [
        ("mean", "pool", "mean"),
        ("none", "pool", "none"),
        ("4", "pool", 4),
        ("3", "project", 3),
        ("0", "register_width", 0),
        ("cls,spurious", "include", ("cls", "spurious")),
        ('["cls"]', "include", ("cls",)),
        ("refresh", "cache", "refresh"),
        ("true", "partial", True),
        ("other", "model", "other"),
        ("int8", "dtype", "int8"),
    ],
)
def test_every_option_reads_from_the_query_as_from_the_body(query, name, value):
    body = {name: list(value) if isinstance(value, tuple) else value}

    assert getattr(parse([(name, query)]), name) == getattr(parse([], body), name) == value


def test_includes_may_be_repeated_but_not_doubled():
    assert parse([("include", "cls"), ("include", "registers")]).include == ("cls", "registers")
    with pytest.raises(InvalidOptionError, match="names one twice"):
        parse([("include", "cls,cls")])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pool": 0}, "pool"),
        ({"pool": 65}, "pool"),
        ({"pool": "max"}, "pool"),
        ({"project": 0}, "project"),
        ({"register_width": -1}, "register_width"),
        ({"include": ["clss"]}, "did you mean 'cls'"),
        ({"include": "cls"}, "include"),
        ({"cache": "of"}, "cache"),
        ({"model": "m" * 65}, "model"),
        ({"partial": "true"}, "partial"),
    ],
)
def test_an_impossible_value_of_a_newer_option_is_refused_by_name(body, message):
    with pytest.raises(InvalidOptionError, match=message):
        parse([], body)


def test_more_layers_than_allowed_are_refused_with_their_own_error():
    with pytest.raises(TooManyLayersError, match="4 layers, 3 are allowed"):
        parse([("layers", "0,1,2,3")])


@pytest.mark.parametrize("name", ["pool", "project"])
def test_what_is_about_patches_does_not_go_with_boxes(name):
    with pytest.raises(InvalidOptionError, match=f"{name!r} is about patches"):
        parse([("boxes", "0,0,9,9"), (name, "2")])

    assert parse([("boxes", "0,0,9,9"), ("pool", "none")]).boxes


def test_shaping_options_are_those_that_change_an_answer_of_given_features():
    shaping = parse([]).shaping()

    assert set(shaping) | {"model", "size", "layers", "register_width", "cache", "partial"} == set(
        FeatureOptions.model_fields
    )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([("pool", "65")], "a factor from 1 to 64"),
        ([("size", "448,448,448")], "448,672 as query parameter"),
    ],
)
def test_options_of_several_kinds_name_them_all(query, message):
    with pytest.raises(InvalidOptionError, match=message):
        parse(query)


def test_a_size_may_be_written_as_buckets_are():
    assert parse([("size", "448x672")]).size == (448, 672)
