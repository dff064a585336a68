import pytest

from service import composing
from service.errors import FeatureOverflowError
from tests.support import encoded, noise_image

PHOTO = encoded(noise_image(80, 112))


@pytest.mark.parametrize("accept", ["application/x-safetensors", "application/x-refinery-frames"])
def test_an_answer_in_which_an_image_failed_has_no_etag(client, accept):
    files = [("images", PHOTO), ("images", PHOTO[: len(PHOTO) // 2])]
    wanted = {"partial": "true"} if accept.endswith("safetensors") else {}

    response = client.post("/features", files=files, params=wanted, headers={"accept": accept})

    assert response.status_code == 200
    assert "etag" not in response.headers


def test_an_answer_of_all_images_has_an_etag(client):
    files = [("images", PHOTO)]

    whole = client.post("/features", files=files, params={"partial": "true"})

    again = client.post("/features", files=files, headers={"if-none-match": whole.headers["etag"]})
    assert again.status_code == 304


def test_an_answer_that_an_image_does_not_fit_has_no_etag_and_is_counted(client, monkeypatch):
    def overflows(*_, index, **__):
        raise FeatureOverflowError("too large", index=index)

    monkeypatch.setattr(composing, "finish", overflows)
    counter = 'refinery_errors_total{code="feature_overflow"}'

    response = client.post("/features", files=[("images", PHOTO)], params={"partial": "true"})

    assert response.status_code == 200
    assert "etag" not in response.headers
    assert f"{counter} 1.0" in client.get("/metrics").text


def test_a_refresh_computes_anew_also_for_a_client_that_has_the_answer(client):
    files = [("images", PHOTO)]
    first = client.post("/features", files=files)

    again = client.post(
        "/features",
        files=files,
        params={"cache": "refresh"},
        headers={"if-none-match": first.headers["etag"]},
    )

    assert again.status_code == 200
    assert again.headers["x-cache"] == "miss"
