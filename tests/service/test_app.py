"""The routes over HTTP, with a tiny model behind them."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

from backbone import open_model
from backbone.preprocess import decode_image, resize_image
from service.bodies import REQUEST_TYPES
from service.composing import composed
from service.decoding import WorkerPool, decode_resized
from service.negotiation import MEDIA_TYPES
from service.options import FeatureOptions
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))
OTHER = encoded(noise_image(64, 64, seed=1))


def metadata(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def post(client, data=PHOTO, headers=PNG, **query):
    return client.post("/features", content=data, headers=headers, params=query)


def fault(response, status, code):
    """The error of a response that must have this status and code."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["message"]
    return error


def expected_tokens(artifact, data, size, **options):
    encoder = open_model(artifact, precision="fp32")
    pixels = resize_image(decode_image(data), size)
    return encoder.encode(pixels[None], **options)


# --- answers


def test_features_are_those_of_the_model_on_the_same_pixels(client, artifact):
    response = post(client, dtype="float32")

    (features,) = expected_tokens(artifact, PHOTO, (64, 64))
    assert response.status_code == 200
    np.testing.assert_allclose(
        load(response.content)["features.0"],
        features.tokens[0].numpy().reshape(4, 4, 32),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_answer_says_what_it_is(client):
    response = post(client, size=96)

    about = metadata(response.content)
    (image,) = json.loads(about["images"])
    assert image["grid"] == [4, 6]  # 80 x 112 px, longest side 96: 64 x 96 px
    assert image["original_size"] == [80, 112]
    assert image["resized_to"] == [64, 96]
    assert image["affine"] == [[6 / 112, 0.0, 0.0], [0.0, 4 / 80, 0.0]]
    assert about["model_digest"] == response.headers["x-model-digest"]
    assert response.headers["content-type"] == "application/x-safetensors"
    stages = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["read", "cache", "decode", "queue", "forward", "encode"]


def test_the_three_kinds_of_body_give_the_same_features(client):
    raw = load(post(client).content)["features.0"]
    multipart = client.post(
        "/features", files=[("images", ("a", PHOTO, "image/png")), ("images", ("b", OTHER))]
    )
    items = [{"data": base64.b64encode(data).decode()} for data in (PHOTO, OTHER)]
    in_json = client.post("/features", json={"images": items, "options": {}})

    for response in (multipart, in_json):
        features = load(response.content)
        np.testing.assert_allclose(features["features.0"], raw, rtol=1e-2, atol=1e-3)
        assert features["features.1"].shape == (4, 4, 32)


def test_options_of_multipart_and_json_count(client):
    options = {"size": [32, 48], "layout": "tokens"}
    multipart = client.post(
        "/features", files={"images": PHOTO}, data={"options": json.dumps(options)}
    )
    items = [{"data": base64.b64encode(PHOTO).decode()}]
    in_json = client.post("/features", json={"images": items, "options": options})

    for response in (multipart, in_json):
        assert load(response.content)["features.0"].shape == (6, 32)


@pytest.mark.parametrize(
    ("layout", "shape"), [("grid", (4, 4, 32)), ("tokens", (16, 32)), ("nchw", (1, 32, 4, 4))]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_layout_and_dtype_comes_in_every_format(client, layout, shape, dtype):
    options = {"layout": layout, "dtype": dtype, "normalize": "true"}

    def answer(media):
        return post(client, headers=PNG | {"accept": media}, **options)

    tensor = load(answer("application/x-safetensors").content)["features.0"]
    array = np.load(io.BytesIO(answer("application/x-npy").content))
    document = answer("application/json").json()

    assert tensor.shape == shape
    assert tensor.dtype == array.dtype == document["dtype"] == dtype
    np.testing.assert_array_equal(array, tensor if layout == "nchw" else tensor[np.newaxis])
    sent = document["images"][0]["features"][0]
    decoded = np.frombuffer(base64.b64decode(sent["data"]), dtype).reshape(sent["shape"])
    np.testing.assert_array_equal(decoded, tensor)


def test_layers_are_counted_from_either_end(client, artifact):
    response = post(client, layers="0,-1", dtype="float32", layout="tokens")

    first, last = expected_tokens(artifact, PHOTO, (64, 64), layers=(0, 1))
    features = load(response.content)
    assert json.loads(metadata(response.content)["layers"]) == [0, 1]
    for name, expected in (("layer0", first), ("layer1", last)):
        np.testing.assert_allclose(
            features[f"features.0.{name}"], expected.tokens[0].numpy(), rtol=1e-4, atol=1e-5
        )


def test_the_same_request_gives_the_same_bytes(client):
    answers = {post(client, data, size=64).content for data in [PHOTO] * 5}

    assert len(answers) == 1


def test_images_of_other_formats_and_modes_are_read(client):
    grey = noise_image(64, 64).convert("L")
    for format, image in (("JPEG", grey), ("WEBP", noise_image(64, 64)), ("GIF", grey)):
        assert post(client, encoded(image, format)).status_code == 200


def test_the_clients_request_id_is_kept_if_it_is_fit_for_a_log(client):
    assert client.get("/livez", headers={"x-request-id": "job-7:3"}).headers["x-request-id"] == (
        "job-7:3"
    )
    replaced = client.get("/livez", headers={"x-request-id": "a b" + "x" * 200})
    assert len(replaced.headers["x-request-id"]) == 32


# --- refusals


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ({"dtyp": "float16"}, "unknown_option", "did you mean 'dtype'"),
        ({"dtype": "float8"}, "invalid_option", "did you mean 'float"),
        ({"size": "100,100"}, "invalid_option", "ask for 96x96"),
        ({"size": "7"}, "invalid_option", "16 px or more"),
        ({"size": "4096"}, "invalid_option", "8192 are allowed"),
        ({"size": "999999999"}, "invalid_option", "4096 are allowed"),
        ({"layers": "2"}, "invalid_option", "-2 to 1"),
        ({"layers": "-3"}, "invalid_option", "-2 to 1"),
        ({"layers": "-1,1"}, "invalid_option", "twice"),
        ({"normalize": "yes"}, "invalid_option", "normalize"),
    ],
)
def test_impossible_options_are_refused(client, query, code, message):
    assert message in fault(post(client, **query), 422, code)["message"]


def test_an_accept_that_is_not_offered_is_refused(client):
    fault(post(client, headers=PNG | {"accept": "text/html"}), 406, "not_acceptable")


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": ""}])
def test_an_unknown_content_type_is_refused(client, headers):
    fault(post(client, headers=headers), 415, "unsupported_content_type")


def test_bytes_that_are_no_image_are_refused_with_their_index(client):
    broken = encoded(noise_image(64, 64), "JPEG")[:-900]

    assert fault(post(client, b"%PDF-1.7"), 415, "unsupported_image")["index"] == 0
    # The second is damaged behind its header, the third is no image at all: the first one counts.
    files = [("images", PHOTO), ("images", broken), ("images", b"nothing")]
    response = client.post("/features", files=files)
    assert fault(response, 422, "undecodable_image")["index"] == 1


def test_broken_bodies_are_refused(client):
    as_json = {"content-type": "application/json"}

    fault(post(client, b""), 400, "malformed_body")
    fault(post(client, b"{", as_json), 400, "malformed_body")
    fault(post(client, b'{"images": [{"data": "%"}]}', as_json), 400, "malformed_image")
    fault(post(client, b'{"pictures": []}', as_json), 422, "unknown_option")


def test_the_query_is_refused_even_when_the_body_is_fine(client):
    response = client.post("/features?options=1", files={"images": PHOTO})

    fault(response, 422, "unknown_option")


def test_limits_are_the_operators(serve):
    limits = {"max_body_bytes": 40_000, "max_images": 2, "max_image_pixels": 80 * 112}
    with serve(**limits) as client:
        many = [("images", encoded(noise_image(16, 16)))] * 3

        assert post(client).status_code == 200
        fault(post(client, bytes(40_001)), 413, "body_too_large")
        fault(post(client, iter([bytes(30_000)] * 2)), 413, "body_too_large")
        fault(client.post("/features", files=many), 413, "too_many_images")
        fault(post(client, encoded(noise_image(80, 113))), 413, "image_too_large")


@pytest.mark.parametrize("side", [7_000, 60_000])
def test_an_image_is_refused_by_the_size_that_its_header_claims(client, side):
    data = bytearray(encoded(Image.new("L", (16, 16))))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")

    assert fault(post(client, bytes(data)), 413, "image_too_large")["index"] == 0


def test_json_is_refused_beyond_a_million_values(serve):
    with serve(max_image_tokens=60_000, batch_tokens=60_000) as client:
        response = post(client, headers=PNG | {"accept": "application/json"}, size="2912,2912")

        assert "x-safetensors" in fault(response, 422, "response_too_large")["message"]


def test_unknown_paths_and_methods_are_typed_too(client):
    assert "'/features'" in fault(client.get("/feature"), 404, "not_found")["message"]
    response = client.get("/features")
    fault(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


# --- information


def test_info_tells_what_is_served_and_allowed(client):
    info = client.get("/info").json()

    assert info["model"]["is_refined"]
    assert info["model"]["native_size"] == [64, 64]
    assert info["model"]["precision"] == "fp32"
    assert info["model"]["register_width"] == 1
    assert info["model"]["num_layers"] == 2
    assert info["limits"]["max_json_values"] == 1_000_000
    assert "JPEG" in info["image_formats"]
    assert info["response_types"][0] == "application/x-safetensors"
    assert info["tolerance"]["measured_relative_error"] <= info["tolerance"]["max_relative_error"]


def test_metrics_count_requests_images_stages_and_errors(serve):
    with serve() as client:
        post(client)
        client.post("/features", files=[("images", PHOTO), ("images", OTHER)])
        post(client, b"junk")
        client.get("/no/such/path")
        text = client.get("/metrics").text

    assert 'refinery_requests_total{route="/features",status="200"} 2.0' in text
    assert 'refinery_requests_total{route="/features",status="415"} 1.0' in text
    assert 'refinery_requests_total{route="other",status="404"} 1.0' in text
    assert "refinery_images_total 2.0" in text  # the third came from the cache
    assert 'refinery_errors_total{code="unsupported_image"} 1.0' in text
    assert 'refinery_stage_seconds_count{stage="forward"} 2.0' in text
    assert 'refinery_cache_lookups_total{result="hit",tier="memory"} 1.0' in text
    assert "refinery_requests_in_flight 0.0" in text


def test_openapi_names_every_error_option_and_format(client):
    document = client.get("/openapi.json").json()

    operation = document["paths"]["/features"]["post"]
    names = [parameter["name"] for parameter in operation["parameters"]]
    headers = ["x-deadline-ms", "x-request-id", "if-none-match"]
    assert names == [*FeatureOptions.model_fields, *headers]
    answers = ["400", "401", "403", "404", "406", "408", "413", "415", "422", "429", "431"]
    assert set(operation["responses"]) == {"200", "304", *answers, "500", "502", "503", "504"}
    assert "`too_many_images`" in operation["responses"]["413"]["description"]
    assert set(operation["requestBody"]["content"]) == set(REQUEST_TYPES)
    assert set(operation["responses"]["200"]["content"]) == set(MEDIA_TYPES)
    assert client.get("/docs").status_code == 200


def test_a_body_beside_others_that_fill_the_memory_comes_too_early(serve):
    with serve(max_body_bytes=40_000, max_held_body_bytes=40_000) as client:
        bodies = client.app.state.service.bodies
        with bodies.hold() as take:
            take(40_000)
            refused = post(client)

        assert fault(refused, 429, "overloaded")["retryable"]
        assert refused.headers["retry-after"] == "1"
        assert post(client).status_code == 200
        assert bodies.num_bytes == 0


def test_an_answer_of_too_many_bytes_is_refused_but_not_its_frames(serve):
    def ask(client, num_images, **headers):
        files = [("images", PHOTO)] * num_images
        return client.post("/features?size=64,64", files=files, headers=headers)

    with serve() as client:
        channels = client.get("/info").json()["model"]["embed_dim"]
    with serve(max_response_bytes=2 * 16 * channels * 2 - 1) as client:
        assert ask(client, 1).status_code == 200
        fault(ask(client, 2), 422, "response_too_large")
        assert ask(client, 2, accept="application/x-refinery-frames").status_code == 200


def test_where_a_model_lies_is_not_for_everybody(client):
    info = client.get("/info").json()

    assert "spec" not in info["model"]
    assert "spec" not in info["models"][0]


def test_components_are_computed_image_by_image_so_that_others_get_a_turn(client, monkeypatch):
    decoders = client.app.state.service.decoders
    run, done = decoders.run, []

    async def watched(work, *arguments):
        done.append(work)
        return await run(work, *arguments)

    monkeypatch.setattr(decoders, "run", watched)

    response = client.post("/features?project=2", files=[("images", PHOTO)] * 3)

    assert response.status_code == 200
    assert done.count(composed) == 3


@pytest.mark.parametrize("path", ["/features/", "/info/", "/docs/"])
def test_no_path_is_redirected_to_the_host_that_the_client_names(client, path):
    response = client.get(path, headers={"host": "evil.example"}, follow_redirects=False)

    fault(response, 404, "not_found")
    assert "location" not in response.headers


def test_the_images_of_a_request_take_turns_in_the_decode_threads(serve, monkeypatch):
    waiting, most = 0, 0
    run = WorkerPool.run

    async def watched(self, work, *arguments):
        nonlocal waiting, most
        if work is not decode_resized:
            return await run(self, work, *arguments)
        waiting += 1
        most = max(most, waiting)
        try:
            return await run(self, work, *arguments)
        finally:
            waiting -= 1

    monkeypatch.setattr(WorkerPool, "run", watched)
    with serve(decode_threads=2) as client:
        files = [("images", encoded(noise_image(64, 64, seed=seed))) for seed in range(12)]

        assert client.post("/features", files=files).status_code == 200

    assert most == 3
