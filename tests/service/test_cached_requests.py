"""Requests and the cache, over HTTP: what is a hit, what is computed once, what is never wrong."""

import asyncio
import io
import itertools
import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import numpy as np
import pytest
from safetensors.numpy import load
from safetensors.numpy import save as save_safetensors

from service.app import create_app
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))
OTHER = encoded(noise_image(64, 64, seed=1))
FRAMES = "application/x-refinery-frames"


def post(client, data=PHOTO, headers=PNG, **query):
    response = client.post("/features", content=data, headers=headers, params=query)
    assert response.status_code == 200, response.text
    return response


def state(response):
    return response.headers["x-cache"]


def test_the_same_image_is_answered_from_the_cache_with_the_same_bytes(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client:
        watched_encoder.batches.clear()

        first, second = post(client), post(client)

    assert (state(first), state(second)) == ("miss", "hit")
    assert first.content == second.content
    assert len(watched_encoder.batches) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "int8"},
        {"dtype": "bfloat16"},
        {"layout": "nchw"},
        {"normalize": "1"},
        {"pool": "mean"},
        {"pool": "2"},
        {"project": "3"},
        {"include": "cls"},
        {"boxes": "1,2,60,70"},
        {"boxes": "1,2,60,70", "box_size": "3", "normalize": "1"},
    ],
    ids=str,
)
def test_what_is_made_of_a_map_is_a_hit_and_equals_what_a_miss_gives(serve, options):
    with serve() as client:
        post(client)

        hit = post(client, **options)
        fresh = post(client, cache="bypass", **options)

    assert (state(hit), state(fresh)) == ("hit", "miss")
    assert hit.content == fresh.content


@pytest.mark.parametrize(
    "options",
    [
        {"size": "96"},
        {"size": "64,96"},
        {"layers": "0"},
        {"layers": "0,1"},
        {"register_width": "2"},
        {"register_width": "0"},
        {"include": "registers"},
        {"include": "spurious"},
    ],
    ids=str,
)
def test_what_the_model_computes_anew_is_a_miss(serve, options):
    with serve() as client:
        post(client)

        changed = post(client, **options)

        assert state(changed) == "miss"
        assert state(post(client, **options)) == "hit"
        assert state(post(client)) == "hit"


def test_bypass_leaves_the_cache_alone_and_refresh_fills_it(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client:
        watched_encoder.batches.clear()

        states = [
            state(post(client, cache=use))
            for use in ("bypass", "default", "bypass", "refresh", "default")
        ]

    assert states == ["miss", "miss", "miss", "miss", "hit"]
    assert len(watched_encoder.batches) == 4


def test_without_cache_everything_is_a_miss(serve):
    with serve(cache="off") as client:
        assert [state(post(client)) for _ in range(2)] == ["miss", "miss"]


def test_hits_and_misses_of_one_request_keep_their_places(serve):
    images = [encoded(noise_image(64, 64, seed)) for seed in range(5)]
    with serve() as client:
        alone = [load(post(client, image).content)["features.0"] for image in images[1::2]]

        mixed = client.post("/features", files=[("images", image) for image in images])
        fresh = client.post("/features?cache=bypass", files=[("images", image) for image in images])

    assert state(mixed) == "partial"
    together, anew = load(mixed.content), load(fresh.content)
    for index in range(5):
        name = f"features.{index}"
        np.testing.assert_allclose(together[name], anew[name], rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(together["features.1"], alone[0])
    np.testing.assert_array_equal(together["features.3"], alone[1])


def test_pixels_and_files_are_told_apart_and_cached_alike(serve):
    pixels = np.asarray(noise_image(64, 64))
    npy = io.BytesIO()
    np.save(npy, pixels[np.newaxis])
    bodies = [
        (encoded(noise_image(64, 64)), "image/png"),
        (npy.getvalue(), "application/x-npy"),
        (save_safetensors({"images": pixels[np.newaxis]}), "application/x-safetensors"),
    ]
    with serve() as client:
        answers = [post(client, data, {"content-type": media}) for data, media in bodies]
        again = [post(client, data, {"content-type": media}) for data, media in bodies]

    assert [state(answer) for answer in answers] == ["miss", "miss", "hit"]
    assert [state(answer) for answer in again] == ["hit", "hit", "hit"]
    for answer in answers:
        np.testing.assert_array_equal(
            load(answer.content)["features.0"], load(answers[0].content)["features.0"]
        )


def test_an_answer_that_the_client_has_is_not_sent_again(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client:
        etag = post(client).headers["etag"]
        watched_encoder.batches.clear()

        same = client.post("/features", content=PHOTO, headers=PNG | {"if-none-match": etag})
        other = client.post("/features", content=OTHER, headers=PNG | {"if-none-match": etag})
        shaped = client.post(
            "/features?dtype=float32", content=PHOTO, headers=PNG | {"if-none-match": etag}
        )

    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert (other.status_code, shaped.status_code) == (200, 200)
    assert len({etag, other.headers["etag"], shaped.headers["etag"]}) == 3


async def in_process(settings, encoder, ask):
    """What `ask(client)` gives, with a client of a service in this event loop."""
    app = create_app(settings, lambda *_: encoder)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        return await ask(client, app.state.service)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_500_identical_misses_at_once_are_one_forward(settings, watched_encoder, cache):
    async def ask(client, service):
        watched_encoder.hold()
        asked = [
            asyncio.ensure_future(client.post("/features", content=PHOTO, headers=PNG))
            for _ in range(500)
        ]
        await asyncio.to_thread(watched_encoder.wait_until_held)
        while service.metrics.coalesced_images._value.get() < 499:
            await asyncio.sleep(0.01)
        watched_encoder.gate.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(in_process(settings(cache=cache), watched_encoder, ask))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(watched_encoder.batches) == 1


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_one_computation_serves_boxes_and_patches_alike(settings, watched_encoder, cache):
    queries = ["boxes=0,0,40,40", "boxes=8,8,60,70&box_size=3", "pool=2", "dtype=float32"]

    async def ask(client, service):
        def post(query):
            return client.post(f"/features?{query}", content=PHOTO, headers=PNG)

        wanted = [await post(f"{query}&cache=bypass") for query in queries]
        watched_encoder.hold()
        asked = [asyncio.ensure_future(post(query)) for query in queries]
        await asyncio.to_thread(watched_encoder.wait_until_held)
        while service.metrics.coalesced_images._value.get() < 3:
            await asyncio.sleep(0.01)
        watched_encoder.gate.set()
        return wanted, await asyncio.gather(*asked)

    wanted, found = asyncio.run(in_process(settings(cache=cache), watched_encoder, ask))

    assert len(watched_encoder.batches) == 1
    for one, other in zip(wanted, found, strict=True):
        assert one.content == other.content


def test_one_request_with_the_same_image_twice_computes_it_once(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client:
        watched_encoder.batches.clear()

        response = client.post("/features", files=[("images", PHOTO)] * 3)

    tensors = load(response.content)
    np.testing.assert_array_equal(tensors["features.0"], tensors["features.2"])
    assert watched_encoder.batches == [(1, 3, 64, 64)]


def test_those_who_wait_for_one_computation_survive_the_one_who_began_it(settings, watched_encoder):
    async def ask(client, service):
        watched_encoder.hold()
        first = asyncio.ensure_future(client.post("/features", content=OTHER, headers=PNG))
        await asyncio.to_thread(watched_encoder.wait_until_held)
        leader = asyncio.ensure_future(client.post("/features", content=PHOTO, headers=PNG))
        while service.batcher._num_images < 1:
            await asyncio.sleep(0.01)
        follower = asyncio.ensure_future(client.post("/features", content=PHOTO, headers=PNG))
        while service.metrics.coalesced_images._value.get() < 1:
            await asyncio.sleep(0.01)
        leader.cancel()
        await asyncio.sleep(0.05)
        watched_encoder.gate.set()
        return [await first, await follower, service.admission.tokens]

    first, follower, tokens = asyncio.run(in_process(settings(), watched_encoder, ask))

    assert (first.status_code, follower.status_code) == (200, 200)
    assert tokens == 0


def test_an_image_that_nobody_waits_for_any_more_costs_no_forward(settings, watched_encoder):
    async def ask(client, service):
        watched_encoder.hold()
        first = asyncio.ensure_future(client.post("/features", content=OTHER, headers=PNG))
        await asyncio.to_thread(watched_encoder.wait_until_held)
        gone = asyncio.ensure_future(client.post("/features", content=PHOTO, headers=PNG))
        while service.batcher._num_images < 1:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.05)
        watched_encoder.gate.set()
        await first
        last = await client.post("/features?size=96", content=OTHER, headers=PNG)
        return last.status_code, service.admission.tokens, service.in_flight

    assert asyncio.run(in_process(settings(), watched_encoder, ask)) == (200, 0, 0)
    assert watched_encoder.batches == [(1, 3, 64, 64), (1, 3, 96, 96)]


def test_a_deadline_takes_a_waiting_image_out_of_the_queue(settings, watched_encoder):
    async def ask(client, service):
        watched_encoder.hold()
        first = asyncio.ensure_future(client.post("/features", content=OTHER, headers=PNG))
        await asyncio.to_thread(watched_encoder.wait_until_held)
        late = await client.post("/features", content=PHOTO, headers=PNG | {"x-deadline-ms": "50"})
        while service.admission.tokens > watched_encoder.num_tokens(64, 64):
            await asyncio.sleep(0.01)  # the cancellation is on its way to the queue
        watched_encoder.gate.set()
        await first
        return late, service.admission.tokens

    late, tokens = asyncio.run(in_process(settings(), watched_encoder, ask))

    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert tokens == 0
    assert watched_encoder.batches == [(1, 3, 64, 64)]


def test_more_than_may_wait_is_refused_as_a_whole_before_decoding(
    settings, watched_encoder, monkeypatch
):
    tokens = watched_encoder.num_tokens(64, 64)
    limits = {"max_queue_tokens": 3 * tokens, "max_image_tokens": 2 * tokens}
    decoded = []

    async def ask(client, service):
        decode = service.workshop._decode
        monkeypatch.setattr(
            service.workshop, "_decode", lambda item: decoded.append(item.index) or decode(item)
        )
        watched_encoder.hold()
        first = asyncio.ensure_future(client.post("/features", content=OTHER, headers=PNG))
        await asyncio.to_thread(watched_encoder.wait_until_held)
        many = await client.post(
            "/features", files=[("images", encoded(noise_image(64, 64, n))) for n in range(9, 12)]
        )
        few = asyncio.ensure_future(
            client.post(
                "/features", files=[("images", encoded(noise_image(64, 64, n))) for n in (9, 10)]
            )
        )
        while service.admission.tokens < 3 * tokens:
            await asyncio.sleep(0.01)
        watched_encoder.gate.set()
        return many, await few, await first, service.admission.tokens

    many, few, first, left = asyncio.run(in_process(settings(**limits), watched_encoder, ask))

    assert (many.status_code, many.json()["error"]["code"]) == (429, "overloaded")
    assert many.json()["error"]["retryable"]
    assert 1 <= int(many.headers["retry-after"]) <= 60
    assert (few.status_code, first.status_code, left) == (200, 200, 0)
    assert decoded == [0, 0, 1]


# --- partial answers and frames


def frames_of(data):
    """The safetensors files of a stream of frames, which must end as it should."""
    files = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        if length == 0:
            assert data[8:] == b""
            return files
        files.append(data[8 : 8 + length])
        data = data[8 + length :]
    raise AssertionError("the stream ends without its end frame")


def metadata(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


BAD = [("images", PHOTO), ("images", b"no image"), ("images", OTHER)]


def test_one_bad_image_fails_the_request_unless_it_is_partial(client):
    whole = client.post("/features", files=BAD)
    partial = client.post("/features?partial=true", files=BAD)

    assert (whole.status_code, whole.json()["error"]["index"]) == (415, 1)
    assert sorted(load(partial.content)) == ["features.0", "features.2"]
    first, second, third = json.loads(metadata(partial.content)["images"])
    assert second["index"] == 1
    assert second["error"]["code"] == "unsupported_image"
    assert (first["grid"], third["grid"]) == ([4, 4], [4, 4])


def test_partial_answers_in_json_list_the_errors_too(client):
    answer = client.post(
        "/features?partial=1", files=BAD, headers={"accept": "application/json"}
    ).json()

    assert [("error" in image, "features" in image) for image in answer["images"]] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_frames_hold_an_image_each_and_its_index(client):
    streamed = client.post("/features", files=BAD, headers={"accept": FRAMES})
    at_once = load(client.post("/features?partial=1", files=BAD).content)

    files = frames_of(streamed.content)
    by_index = {int(metadata(file)["index"]): file for file in files}
    assert sorted(by_index) == [0, 1, 2]
    for index in (0, 2):
        np.testing.assert_array_equal(
            load(by_index[index])[f"features.{index}"], at_once[f"features.{index}"]
        )
    assert json.loads(metadata(by_index[1])["error"])["code"] == "unsupported_image"


def test_a_slow_image_holds_up_no_other_in_a_stream(settings, watched_encoder):
    async def order(client, _):
        await client.post("/features", content=OTHER, headers=PNG)
        answer = await client.post(
            "/features",
            files=[("images", PHOTO), ("images", OTHER)],
            headers={"accept": FRAMES},
        )
        return [int(metadata(file)["index"]) for file in frames_of(answer.content)]

    assert asyncio.run(in_process(settings(), watched_encoder, order)) == [1, 0]


def test_a_frame_that_is_not_done_by_the_deadline_says_so(settings, watched_encoder):
    async def ask(client, _):
        await client.post("/features", content=OTHER, headers=PNG)
        watched_encoder.hold()
        answer = await client.post(
            "/features",
            files=[("images", PHOTO), ("images", OTHER)],
            headers={"accept": FRAMES, "x-deadline-ms": "200"},
        )
        watched_encoder.gate.set()
        return frames_of(answer.content)

    fast, slow = asyncio.run(in_process(settings(), watched_encoder, ask))

    assert metadata(fast)["index"] == "1"
    assert json.loads(metadata(slow)["error"])["code"] == "deadline_exceeded"


# --- composition


def test_every_mix_and_order_gives_each_image_what_it_gets_alone(serve, watched_encoder):
    """Any images, sizes and options at a time: each answer is that of the image alone."""
    images = [encoded(noise_image(48 + 16 * n, 80, seed=n)) for n in range(6)]
    options = [{"size": "64"}, {"size": "32,96"}, {"layers": "0"}, {"register_width": "0"}]
    wanted = [
        (image, option | {"dtype": "float32", "cache": "bypass"})
        for image, option in itertools.product(images, options)
    ]
    order = np.random.default_rng(0).permutation(len(wanted))
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(12) as threads:
        tolerance = client.get("/info").json()["tolerance"]["max_relative_error"]
        alone = [load(post(client, image, **query).content) for image, query in wanted]
        watched_encoder.batches.clear()
        together = dict(
            zip(
                order,
                threads.map(
                    lambda n: load(post(client, wanted[n][0], **wanted[n][1]).content), order
                ),
                strict=True,
            )
        )

    assert max(batch[0] for batch in watched_encoder.batches) > 1
    for number, features in enumerate(alone):
        one, other = features["features.0"], together[number]["features.0"]
        error = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(one, axis=-1)
        assert error.max() <= tolerance


def test_two_models_that_wait_together_answer_for_themselves(settings, artifact, tmp_path):
    from tests.service.conftest import running_client
    from tests.support import tiny_artifact

    second = tiny_artifact(tmp_path / "second", seed=5)
    chosen = settings(model=(f"a={artifact}", f"b={second}"))
    with running_client(chosen) as client:
        default, a, b = (
            load(post(client, **query).content)["features.0"]
            for query in ({}, {"model": "a"}, {"model": "b"})
        )
        barrier = threading.Barrier(8)

        def ask(name):
            barrier.wait()
            return load(post(client, model=name, cache="bypass").content)["features.0"]

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, "abababab"))

    np.testing.assert_array_equal(default, a)
    assert np.abs(a - b).max() > 0.1
    for name, features in zip("abababab", answers, strict=True):
        expected = a if name == "a" else b
        np.testing.assert_allclose(features, expected, rtol=1e-2, atol=1e-3)
