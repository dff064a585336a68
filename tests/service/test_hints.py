import pytest

from service import hints
from service.hints import nearest


@pytest.mark.parametrize(
    ("name", "hint"),
    [("layer", "did you mean 'layers'?"), ("DTYPE", "did you mean 'dtype'?"), ("x", "valid are")],
)
def test_nearest_offers_the_name_that_was_meant(name, hint):
    assert nearest(name, ["layers", "dtype", "size"]).startswith(hint)


def test_a_name_of_megabytes_is_not_compared_as_a_whole(monkeypatch):
    compared = []
    monkeypatch.setattr(
        hints.difflib, "get_close_matches", lambda word, *_, **__: compared.append(len(word)) or []
    )

    hint = nearest("a" * 10_000_000, ["layers"])

    assert hint == "valid are layers"
    assert compared == [100]
