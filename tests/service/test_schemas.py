import pytest

from service.errors import InvalidOptionError, UnknownOptionError
from service.schemas import FeatureOptions, parse_options


def test_without_options_the_defaults_hold():
    assert parse_options([], None) == FeatureOptions()


@pytest.mark.parametrize(
    ("text", "size"), [("448", 448), ("224,336", (224, 336)), ("[224, 336]", (224, 336))]
)
def test_sizes_read_the_same_from_query_and_body(text, size):
    body = {"size": list(size) if isinstance(size, tuple) else size}

    assert parse_options([("size", text)]).size == parse_options([], body).size == size


@pytest.mark.parametrize(
    "query",
    [[("layers", "-1,-4")], [("layers", "[-1,-4]")], [("layers", "-1"), ("layers", "-4")]],
)
def test_layers_may_be_listed_or_repeated(query):
    assert parse_options(query).layers == (-1, -4)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False)])
def test_switches_read_as_words_or_digits(text, value):
    assert parse_options([("normalize", text)]).normalize is value


def test_query_and_body_are_joined():
    options = parse_options([("dtype", "float32")], {"layout": "nchw"})

    assert (options.dtype, options.layout) == ("float32", "nchw")


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownOptionError, match="'normalise': did you mean 'normalize'"):
        parse_options([("normalise", "1")])


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
        ({"size": 10**400}, "cannot be read"),
        ({"dtype": "\ud800"}, "cannot be read"),
    ],
)
def test_an_impossible_value_is_refused_by_name(body, message):
    with pytest.raises(InvalidOptionError, match=message):
        parse_options([], body)


@pytest.mark.parametrize("text", ["", "x", "1,x", "9" * 5000, "٣", "1.5", "[[1]]", "--1"])
def test_sizes_that_are_no_numbers_are_refused(text):
    with pytest.raises(InvalidOptionError):
        parse_options([("size", text)])


def test_an_option_given_twice_is_refused():
    with pytest.raises(InvalidOptionError, match="twice"):
        parse_options([("dtype", "float16"), ("dtype", "float32")])
    with pytest.raises(InvalidOptionError, match="both in the query and in the body"):
        parse_options([("dtype", "float16")], {"dtype": "float16"})
