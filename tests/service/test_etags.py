import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.etags import etag_of, matches
from service.negotiation import MEDIA_TYPES
from service.options import FeatureOptions
from tests.service.feature_maps import item
from tests.service.plans import served_model

MODEL, OTHER_MODEL = served_model(name="one"), served_model(name="two")
TAG = etag_of("application/json", [item("a")], FeatureOptions())

shaping = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["float16", "float32", "bfloat16", "int8"]),
        "layout": st.sampled_from(["grid", "tokens", "nchw"]),
        "normalize": st.booleans(),
        "pool": st.sampled_from(["none", "mean", 1, 2]),
        "project": st.sampled_from([None, 1, 2]),
        "include": st.sampled_from([(), ("cls",), ("registers", "cls"), ("spurious",)]),
        "boxes": st.sampled_from(
            [None, ((),), (((0.0, 0.0, 1.0, 2.0),),), (((0.0, 0.0, 1.0, 2.5),),)]
        ),
        "box_size": st.sampled_from([1, 2]),
    }
)
# Of the request, and no part of its answer.
handling = st.fixed_dictionaries(
    {"cache": st.sampled_from(["default", "bypass", "refresh"]), "partial": st.booleans()}
)
images = st.lists(
    st.tuples(st.sampled_from(["a", "b", "ab"]), st.sampled_from([(1, 12), (11, 2), (2, 11)])),
    min_size=1,
    max_size=3,
)
requests = st.tuples(
    st.sampled_from(MEDIA_TYPES), images, st.sampled_from([MODEL, OTHER_MODEL]), shaping
)


def name(media, images, model, shaping, handling):
    items = [
        item(key, original, index=index, model=model)
        for index, (key, original) in enumerate(images)
    ]
    return etag_of(media, items, FeatureOptions(**shaping, **handling))


@given(requests, requests, handling, handling, st.lists(st.booleans(), min_size=4, max_size=4))
def test_two_requests_share_an_etag_exactly_when_their_answers_are_equal(
    one, other, first_handling, second_handling, keeps
):
    # Most pairs differ in a few things only: those are the ones that could be confused.
    other = tuple(a if keep else b for a, b, keep in zip(one, other, keeps, strict=True))

    is_same = name(*one, first_handling) == name(*other, second_handling)

    assert is_same == (one == other)


@given(shaping, shaping, st.sampled_from(sorted(FeatureOptions().shaping())))
def test_each_shaping_option_alone_changes_the_etag(one, other, option):
    changed = one | {option: other[option]}

    is_same = name("application/json", [("a", (1, 2))], MODEL, one, {}) == name(
        "application/json", [("a", (1, 2))], MODEL, changed, {}
    )

    assert is_same == (one == changed)


def test_an_etag_is_weak_and_quoted():
    assert TAG.startswith('W/"')
    assert TAG.endswith('"')
    assert TAG.isascii()


@pytest.mark.parametrize(
    "header",
    [
        TAG,
        TAG.removeprefix("W/"),
        f'"other", {TAG}',
        f'{TAG},W/"other"',
        f"  {TAG}  ",
        f'W/"other" ,\t{TAG.removeprefix("W/")}',
    ],
    ids=["weak", "strong", "last of a list", "first of a list", "in blanks", "tabs"],
)
def test_a_client_that_names_the_etag_has_the_answer(header):
    assert matches(header, TAG)


@pytest.mark.parametrize(
    "header",
    [None, "", "*", '"other"', TAG.strip('W/"'), TAG[:-1], f'"*{TAG}"', f'x{TAG}, "*"'],
    ids=["none", "empty", "any", "other", "unquoted", "cut off", "longer", "quoted star"],
)
def test_a_client_that_names_others_has_it_not(header):
    assert not matches(header, TAG)
