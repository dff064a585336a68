import pytest

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
