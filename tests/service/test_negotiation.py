import pytest

from service.errors import NotAcceptableError
from service.negotiation import MEDIA_TYPES, negotiate


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, "application/x-safetensors"),
        ("", "application/x-safetensors"),
        ("*/*", "application/x-safetensors"),
        ("application/*", "application/x-safetensors"),
        ("image/*", "image/png"),
        ("application/json", "application/json"),
        ("application/json; charset=utf-8", "application/json"),
        ("Application/X-NPY", "application/x-npy"),
        ("text/html, application/json;q=0.5, application/x-npy;q=0.9", "application/x-npy"),
        ("application/json ; Q=0.5 , application/x-npy ; q=0.4", "application/json"),
        ("application/x-safetensors;q=0, */*", "application/x-npy"),
        ("*/*;q=0.1, application/json;q=0.2", "application/json"),
        ("*/*, application/json;q=0.2", "application/x-safetensors"),
        ("image/*;q=0.9, application/*;q=0.3, */*;q=1", "image/png"),
        ("image/avif,image/webp,image/png,*/*;q=0.8", "image/png"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/x-safetensors"),
        (",, application/json,", "application/json"),
    ],
)
def test_accept_chooses_the_format(accept, media):
    assert negotiate(accept) == media


@pytest.mark.parametrize("media", MEDIA_TYPES)
def test_every_format_can_be_asked_for_by_name(media):
    assert negotiate(f"text/html, {media};q=0.1") == media


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/webp",
        "*/*;q=0",
        "application/json;q=x",
        "application/json;q=nan",
        "application/json;q=-1",
        "application/json;q=0, text/*",
        "*",
        ",",
        "json/*",
    ],
)
def test_formats_that_are_not_offered_are_refused_with_those_that_are(accept):
    with pytest.raises(NotAcceptableError, match="x-safetensors") as caught:
        negotiate(accept)

    assert all(media in caught.value.message for media in MEDIA_TYPES)


def test_a_long_header_is_not_repeated_as_a_whole():
    with pytest.raises(NotAcceptableError) as caught:
        negotiate("text/html, " * 10_000)

    assert len(caught.value.message) < 400
