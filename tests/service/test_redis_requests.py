"""Replicas that share a Redis, over HTTP: what one computes all find, and its faults do no harm."""

import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load

from service.cache.entry import dump
from service.cache.entry import load as load_entry
from service.cache.writer import KEY_PREFIX
from tests.service.cache.helpers import REDIS_SERVER, RedisServer
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))
OTHER = encoded(noise_image(80, 112, seed=1))

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(
        REDIS_SERVER is None, reason="no redis-server is installed (Debian: redis-server)"
    ),
]


@pytest.fixture
def redis(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def replica(serve, redis):
    """A context manager: a client of a service that keeps nothing in memory, only in Redis."""

    def make(**changes):
        url = f"redis://127.0.0.1:{redis.port}/0"
        return serve(**({"cache": url, "cache_bytes": 0} | changes))

    return make


def post(client, image=PHOTO, **query):
    response = client.post("/features", content=image, headers=PNG, params=query)
    assert response.status_code == 200, response.text
    return response


def wait_for_keys(redis, count):
    with redis.admin() as admin:
        deadline = time.monotonic() + 10
        while admin.dbsize() < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return admin.keys()


def test_one_replica_answers_from_what_another_has_computed(replica, redis):
    with replica() as first:
        computed = post(first)
        wait_for_keys(redis, 1)
    with replica() as second:
        shared = post(second)
        boxes = post(second, boxes="0,0,50,50")

    assert [answer.headers["x-cache"] for answer in (computed, shared, boxes)] == [
        "miss",
        "hit",
        "hit",
    ]
    assert shared.content == computed.content


def test_images_found_in_redis_and_new_ones_keep_their_places(replica, redis):
    images = [encoded(noise_image(64, 64, seed)) for seed in range(4)]
    with replica() as client:
        alone = [load(post(client, image).content)["features.0"] for image in images[1::2]]
        wait_for_keys(redis, 2)

        mixed = client.post("/features", files=[("images", image) for image in images])

    assert mixed.headers["x-cache"] == "partial"
    tensors = load(mixed.content)
    np.testing.assert_array_equal(tensors["features.1"], alone[0])
    np.testing.assert_array_equal(tensors["features.3"], alone[1])


def test_a_redis_that_dies_and_comes_back_costs_no_error(replica, redis):
    with replica() as client:
        wanted = post(client).content
        wait_for_keys(redis, 1)

        redis.kill()
        without = [post(client) for _ in range(3)]
        redis.start()
        deadline = time.monotonic() + 20
        while post(client).headers["x-cache"] != "hit":
            assert time.monotonic() < deadline
            time.sleep(0.1)

    assert {answer.headers["x-cache"] for answer in without} == {"miss"}
    for answer in without:
        np.testing.assert_allclose(
            load(answer.content)["features.0"], load(wanted)["features.0"], rtol=1e-2, atol=1e-3
        )


def test_a_redis_that_hangs_is_waited_for_only_so_long(replica, redis):
    with replica() as client:
        post(client)
        wait_for_keys(redis, 1)
        redis.pause()

        started = time.monotonic()
        answers = [post(client, encoded(noise_image(64, 64, seed))) for seed in range(12)]
        seconds = time.monotonic() - started
        redis.resume()
        text = client.get("/metrics").text

    assert {answer.headers["x-cache"] for answer in answers} == {"miss"}
    # Five time-outs of 0.1 s open the breaker; each of the twelve alone would be 1.2 s and more.
    assert seconds < 6
    assert "refinery_cache_breaker_open 1.0" in text


def test_a_value_that_was_changed_is_computed_anew(replica, redis):
    with replica() as client:
        wanted = post(client)
        (key,) = wait_for_keys(redis, 1)
        with redis.admin() as admin:
            value = bytearray(admin.get(key))
            value[len(value) // 2] ^= 1
            admin.set(key, bytes(value))

        fresh = post(client)

        assert fresh.headers["x-cache"] == "miss"
        assert fresh.content == wanted.content
        assert 'refinery_cache_errors_total{kind="corrupt"} 1.0' in client.get("/metrics").text


def test_what_another_program_wrote_with_a_right_checksum_is_computed_anew(replica, redis, caplog):
    with replica() as client:
        computed = post(client)
        (name,) = wait_for_keys(redis, 1)
        key = name.decode().removeprefix(KEY_PREFIX)
        with redis.admin() as admin:
            entry = load_entry(admin.get(name), key)
            admin.set(name, dump(replace(entry, tensors={}), key))

        again = post(client)

    assert again.headers["x-cache"] == "miss"
    assert again.content == computed.content
    assert "another program wrote" in caplog.text
