"""How requests of several clients share the service, and what a fault costs whom."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors.numpy import load
from starlette.testclient import TestClient

from backbone.preprocess import decode_image, resize_image
from service import work
from service.app import create_app
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))


def post(client, data=PHOTO, headers=PNG, **query):
    return client.post("/features", content=data, headers=headers, params=query)


def fault(response, status, code):
    """The error of a response that must have this status and code."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def seed_image(seed):
    return encoded(noise_image(64, 64, seed))


def features_of(client, image, cache="default"):
    return load(post(client, image, dtype="float32", cache=cache).content)["features.0"]


def gauge(client, name):
    text = client.get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(f"refinery_{name} ")]
    return float(line.split()[1])


def post_in_thread(client):
    threads = ThreadPoolExecutor(1)
    future = threads.submit(post, client)
    threads.shutdown(wait=False)
    return future


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_that_come_during_a_forward_share_the_next(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        watched_encoder.hold()
        first = threads.submit(post, client)
        watched_encoder.wait_until_held()
        rest = [threads.submit(post, client, seed_image(seed)) for seed in range(6)]
        wait_for(lambda: gauge(client, "queue_images") == 6)
        watched_encoder.gate.set()

        assert all(future.result().status_code == 200 for future in [first, *rest])
    assert [batch[0] for batch in watched_encoder.batches] == [1, 6]


def test_the_company_of_an_image_changes_nothing_beyond_the_tolerance(serve, watched_encoder):
    images = [seed_image(seed) for seed in range(12)]
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(12) as threads:
        alone = [features_of(client, image) for image in images]
        together = list(threads.map(lambda image: features_of(client, image, "bypass"), images))
        tolerance = client.get("/info").json()["tolerance"]

    assert max(batch[0] for batch in watched_encoder.batches) > 1
    for one, other in zip(alone, together, strict=True):
        error = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(one, axis=-1)
        assert error.max() <= tolerance["max_relative_error"]


def test_one_poisoned_image_does_not_fail_the_others(serve, watched_encoder, caplog):
    poison = resize_image(decode_image(seed_image(3)), (64, 64))
    watched_encoder.fails = lambda images: any(torch.equal(image, poison) for image in images)
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        watched_encoder.hold()
        first = threads.submit(post, client)
        watched_encoder.wait_until_held()
        rest = [threads.submit(post, client, seed_image(seed)) for seed in range(6)]
        wait_for(lambda: gauge(client, "queue_images") == 6)
        watched_encoder.gate.set()

        statuses = [future.result().status_code for future in [first, *rest]]
        fault(rest[3].result(), 500, "encoding_failed")
    assert statuses == [200, 200, 200, 200, 500, 200, 200]
    assert "planted failure" in caplog.text


def test_a_fault_of_the_service_is_typed_and_logged_under_its_id(client, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("service.answering.resolve_layers", broken)

    error = fault(post(client), 500, "internal")

    assert error["request_id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_nothing_is_served_before_the_warm_up(settings, watched_encoder):
    loading = threading.Event()

    def slow_load(*_):
        assert loading.wait(10)
        return watched_encoder

    app = create_app(settings(), slow_load)
    with TestClient(app) as client:
        assert client.get("/livez").status_code == client.get("/healthz").status_code == 200
        for path in ("/readyz", "/startupz", "/info"):
            assert fault(client.get(path), 503, "not_ready")["retryable"]
        assert fault(post(client), 503, "not_ready")["retryable"]

        loading.set()
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/startupz").status_code == 200
        assert post(client).status_code == 200


def test_a_draining_service_lives_but_takes_nothing(serve):
    with serve() as client:
        client.app.state.service.drain()

        assert client.get("/livez").status_code == client.get("/startupz").status_code == 200
        fault(client.get("/readyz"), 503, "draining")
        response = post(client)
        assert fault(response, 503, "draining")["retryable"]
        assert response.headers["retry-after"] == "1"


def test_an_engine_that_dies_takes_liveness_with_it(serve, monkeypatch, caplog):
    with serve() as client:
        engine = client.app.state.service.engines[0]
        monkeypatch.setattr(engine, "_finish", lambda _: 1 / 0)

        response = post_in_thread(client)
        wait_for(lambda: client.get("/livez").status_code == 503)

        fault(client.get("/readyz"), 503, "not_ready")
        assert response.result(10).status_code == 503
    assert "the engine on cpu stopped" in caplog.text


def test_pixels_that_wait_for_an_engine_are_bounded_in_bytes(serve, watched_encoder, monkeypatch):
    monkeypatch.setattr(work, "_MAX_DECODED_BYTES", 3 * 64 * 64 * 3)
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        watched_encoder.hold()
        first = threads.submit(post, client)
        watched_encoder.wait_until_held()
        tokens = gauge(client, "admitted_tokens")
        rest = [threads.submit(post, client, seed_image(seed), size="64,64") for seed in range(6)]
        wait_for(lambda: gauge(client, "admitted_tokens") == 7 * tokens)
        wait_for(lambda: gauge(client, "queue_images") == 2)
        time.sleep(0.1)
        num_waiting = gauge(client, "queue_images")
        watched_encoder.gate.set()

        assert num_waiting == 2
        assert all(future.result().status_code == 200 for future in [first, *rest])


def test_more_features_than_may_be_held_are_refused_before_anything_is_decoded(serve):
    with serve(max_feature_bytes=4 * 4 * 32 * 4 * 3) as client:
        four, three = ([("images", seed_image(seed)) for seed in range(num)] for num in (4, 3))

        fitting = client.post("/features", files=three, params={"pool": "mean", "size": "64,64"})
        large = client.post("/features", files=four, params={"pool": "mean", "size": "64,64"})

        assert fitting.status_code == 200
        error = fault(large, 422, "response_too_large")
        assert "8192 bytes" in error["message"]
        assert gauge(client, "admitted_tokens") == 0


def test_the_body_of_a_stream_of_frames_counts_until_its_end(serve, watched_encoder):
    accept = PNG | {"accept": "application/x-refinery-frames"}
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(1) as threads:
        bodies = client.app.state.service.bodies
        watched_encoder.hold()
        streamed = threads.submit(post, client, headers=accept)
        watched_encoder.wait_until_held()
        time.sleep(0.05)
        held_bytes = bodies.num_bytes
        watched_encoder.gate.set()

        assert streamed.result().status_code == 200
        assert held_bytes == len(PHOTO)
        wait_for(lambda: bodies.num_bytes == 0)
