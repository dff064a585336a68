import inspect

import pytest

from backbone import errors as backbone_errors
from service import errors
from service.features import FEATURE_ERRORS

ALL = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, errors.ServiceError) and error is not errors.ServiceError
]


def test_codes_are_unique_and_every_class_has_its_sentence():
    assert len({error.code for error in ALL}) == len(ALL)
    for error in ALL:
        assert error.__doc__.strip().endswith(".")
        assert 400 <= error.status < 600


def test_the_body_has_an_index_only_where_an_image_is_meant():
    whole = errors.DrainingError("bye").body("r1").model_dump(exclude_none=True)
    one = errors.UndecodableImageError("broken", index=0).body("r2").model_dump(exclude_none=True)

    assert whole == {
        "error": {"code": "draining", "message": "bye", "retryable": True, "request_id": "r1"}
    }
    assert one["error"]["index"] == 0
    assert one["error"]["retryable"] is False


@pytest.mark.parametrize("error", backbone_errors.ImageError.__subclasses__())
def test_every_image_error_of_the_backbone_has_a_typed_answer(error):
    answer = errors.from_image_error(error("it is broken"), 3)

    assert answer.index == 3
    assert 400 <= answer.status < 500
    assert str(answer) == "image 3: it is broken"


def test_documented_responses_are_the_statuses_of_the_classes():
    documented = errors.responses(*FEATURE_ERRORS)

    assert set(documented) == {error.status for error in FEATURE_ERRORS}
    for error in FEATURE_ERRORS:
        assert f"`{error.code}`" in documented[error.status]["description"]
