import pytest

from service.hints import nearest


@pytest.mark.parametrize(
    ("name", "hint"),
    [("layer", "did you mean 'layers'?"), ("DTYPE", "did you mean 'dtype'?"), ("x", "valid are")],
)
def test_nearest_offers_the_name_that_was_meant(name, hint):
    assert nearest(name, ["layers", "dtype", "size"]).startswith(hint)
