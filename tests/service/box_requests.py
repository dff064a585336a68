"""Requests for boxes, as several tests send them."""

import base64
import time

from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
HEIGHT, WIDTH = 80, 112
PHOTO = encoded(noise_image(HEIGHT, WIDTH))
OTHER = encoded(noise_image(64, 64, seed=1))
BOXES = [
    [10.5, 20, 60, 70.25],
    [0, 0, WIDTH, HEIGHT],
    [-30, -10, 40, 30],  # partly outside
    [90, 60, 200, 150],  # partly outside at the other end
    [50, 30, 50.5, 30.5],  # smaller than a patch
]


def post(client, data=PHOTO, headers=PNG, **query):
    response = client.post("/features", content=data, headers=headers, params=query)
    assert response.status_code == 200, response.text
    return response


def post_json(client, images, headers=None, **options):
    items = [{"data": base64.b64encode(data).decode()} for data in images]
    return client.post("/features", json={"images": items, "options": options}, headers=headers)


def fault(response, code="invalid_option"):
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == code
    return error


def query_of(boxes):
    return ",".join(str(side) for box in boxes for side in box)


def wait_for_queue(client, num_images, seconds=10.0):
    """Wait until so many images wait for an engine."""
    deadline = time.monotonic() + seconds
    while f"refinery_queue_images {float(num_images)}\n" not in client.get("/metrics").text:
        assert time.monotonic() < deadline, f"{num_images} images did not come to wait"
        time.sleep(0.01)
