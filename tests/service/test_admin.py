"""Models loaded and dropped over HTTP while the service runs."""

import gc
import json
import threading
import time
import weakref

import numpy as np
import pytest
from safetensors.numpy import load

from backbone import open_model
from service.keys import key_line
from tests.service.conftest import WatchedEncoder
from tests.support import encoded, noise_image, tiny_artifact

ADMIN, USER = "a" * 24, "u" * 24
PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    lines = (key_line("root", ADMIN, is_admin=True), key_line("alice", USER, is_admin=False))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def other_artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture
def admin(serve, key_file):
    """A client with a key that has the right `admin`."""
    with serve(api_key_file=key_file) as client:
        client.headers["x-api-key"] = ADMIN
        yield client


def load_model(client, path, name="other"):
    return client.post("/admin/models", json={"name": name, "path": str(path)})


def names(client):
    return [model["name"] for model in client.get("/admin/models").json()]


def features(client, **query):
    response = client.post("/features", content=PHOTO, headers=PNG, params=query)
    assert response.status_code == 200, response.text
    return response


def fault(response, status, code):
    """The message of a response that must have this status and code."""
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
    return response.json()["error"]["message"]


def test_a_model_is_loaded_listed_used_and_dropped(admin, other_artifact):
    (first,) = names(admin)

    loaded = load_model(admin, other_artifact)

    assert loaded.status_code == 201
    assert loaded.json()["spec"] == str(other_artifact)
    assert admin.get("/admin/models").json()[1] == loaded.json()
    assert names(admin) == [first, "other"]
    answer = features(admin, model="other")
    assert answer.headers["x-model-digest"] == loaded.json()["digest"]
    assert features(admin).headers["x-model-digest"] != loaded.json()["digest"]

    assert admin.delete("/admin/models/other").status_code == 204

    assert names(admin) == [first]
    refused = admin.post("/features", content=PHOTO, headers=PNG, params={"model": "other"})
    assert fault(refused, 404, "unknown_model")


def test_each_model_answers_with_its_own_features_and_name(admin, artifact, other_artifact):
    load_model(admin, other_artifact)

    answers = [features(admin, dtype="float32"), features(admin, dtype="float32", model="other")]

    for answer, path, seed in zip(answers, (artifact, other_artifact), (0, 1), strict=True):
        encoder = open_model(path, precision="fp32")
        assert answer.headers["x-model-digest"] == encoder.digest, seed
    first, second = (load(answer.content)["features.0"] for answer in answers)
    assert first.shape == second.shape
    assert not np.allclose(first, second, atol=1e-2)
    length = int.from_bytes(answers[1].content[:8], "little")
    metadata = json.loads(answers[1].content[8 : 8 + length])["__metadata__"]
    assert metadata["model"] == "other"
    assert answers[0].headers["etag"] != answers[1].headers["etag"]


def test_the_same_weights_under_two_names_share_the_cache(admin, artifact):
    load_model(admin, artifact, name="again")

    assert features(admin).headers["x-cache"] == "miss"
    assert features(admin, model="again").headers["x-cache"] == "hit"


def test_the_first_model_may_be_dropped_and_the_next_is_the_default(admin, other_artifact):
    (first,) = names(admin)
    digest = load_model(admin, other_artifact).json()["digest"]

    assert admin.delete(f"/admin/models/{first}").status_code == 204

    assert features(admin).headers["x-model-digest"] == digest
    assert admin.get("/info").json()["model"]["name"] == "other"


def test_the_metrics_name_the_models_that_are_served(admin, other_artifact):
    def is_shown():
        return 'model="other"' in admin.get("/metrics").text

    load_model(admin, other_artifact)
    assert is_shown()

    admin.delete("/admin/models/other")
    assert not is_shown()


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä", "x" * 65, "a\n", ".", "..", ".a", 3, None])
def test_a_name_that_is_none_is_refused(admin, other_artifact, name):
    response = admin.post("/admin/models", json={"name": name, "path": str(other_artifact)})

    assert fault(response, 422, "invalid_option").startswith("name: ")
    assert len(names(admin)) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{", 400, "malformed_body", "not JSON"),
        (b"", 400, "malformed_body", "not JSON"),
        (b"[]", 422, "invalid_option", "send {"),
        (b'{"name": "x"}', 422, "invalid_option", "path: "),
        (b'{"name": "x", "path": ""}', 422, "invalid_option", "path: "),
        (b'{"name": "x", "path": "y", "z": 1}', 422, "invalid_option", "z: "),
        (b" " * 20_000, 413, "body_too_large", "16384"),
    ],
)
def test_a_body_that_names_no_model_is_refused(admin, body, status, code, message):
    assert message in fault(admin.post("/admin/models", content=body), status, code)


def test_a_path_that_is_no_model_is_refused_and_nothing_changes(admin, tmp_path):
    before = names(admin)

    message = fault(load_model(admin, tmp_path / "nothing"), 422, "model_not_loaded")

    assert str(tmp_path / "nothing") in message
    assert names(admin) == before
    assert features(admin)


@pytest.mark.parametrize("path", ["\0", "x\0y", "../nothing", "vit_no_such_model", "local-dir:/no"])
def test_no_path_makes_the_service_fail(admin, path):
    assert fault(load_model(admin, path), 422, "model_not_loaded")


def test_a_damaged_model_is_refused(admin, tmp_path):
    folder = tiny_artifact(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    assert fault(load_model(admin, folder), 422, "model_not_loaded")


def test_a_name_that_is_taken_is_a_conflict(admin, other_artifact):
    (first,) = names(admin)

    message = fault(load_model(admin, other_artifact, name=first), 409, "conflict")

    assert "drop it first" in message


def test_the_only_model_is_not_dropped(admin):
    (first,) = names(admin)

    assert "only model" in fault(admin.delete(f"/admin/models/{first}"), 409, "conflict")
    assert features(admin)


def test_dropping_a_model_that_is_not_served_says_which_are(admin):
    (first,) = names(admin)

    assert first in fault(admin.delete("/admin/models/other"), 404, "unknown_model")


def test_probes_and_requests_are_answered_while_a_model_is_loaded(serve, key_file, artifact):
    gate, entered = threading.Event(), threading.Event()
    gate.set()

    def open_encoder(_spec, _settings, device):
        entered.set()
        assert gate.wait(10)
        return open_model(artifact, device=device, precision="fp32")

    with serve(open_encoder, api_key_file=key_file) as client:
        client.headers["x-api-key"] = ADMIN
        gate.clear()
        entered.clear()
        answers = []
        loading = threading.Thread(target=lambda: answers.append(load_model(client, "any")))
        loading.start()
        assert entered.wait(10)

        assert client.get("/readyz").status_code == 200
        assert features(client)
        assert "being loaded" in fault(load_model(client, "any", name="third"), 409, "conflict")
        assert len(names(client)) == 1

        gate.set()
        loading.join(10)
        assert answers[0].status_code == 201
        assert names(client)[1:] == ["other"]


def test_a_request_that_has_begun_is_answered_by_the_model_that_was_dropped(
    serve, key_file, artifact, other_artifact
):
    watched = WatchedEncoder(open_model(other_artifact, precision="fp32"))

    def open_encoder(spec, _settings, device):
        if spec == "watched":
            return watched
        return open_model(artifact, device=device, precision="fp32")

    with serve(open_encoder, api_key_file=key_file) as client:
        client.headers["x-api-key"] = ADMIN
        load_model(client, "watched")
        watched.hold()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(features(client, model="other")))
        asking.start()
        watched.wait_until_held()

        assert client.delete("/admin/models/other").status_code == 204
        watched.gate.set()
        asking.join(10)

        assert answers[0].headers["x-model-digest"] == watched.digest
        assert len(names(client)) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/models"), ("POST", "/admin/models"), ("DELETE", "/admin/models/tiny")],
)
def test_only_a_key_with_the_right_opens_it(serve, key_file, method, path):
    with serve(api_key_file=key_file) as client:
        fault(client.request(method, path), 401, "unauthorized")
        fault(client.request(method, path, headers={"x-api-key": USER}), 403, "forbidden")
        fault(client.request(method, path, headers={"x-api-key": "x" * 24}), 401, "unauthorized")


def test_without_keys_nobody_administers(client):
    for method in ("GET", "POST"):
        message = fault(client.request(method, "/admin/models"), 403, "forbidden")
        assert "--api-key-file" in message


def test_a_service_that_shuts_down_loads_no_model(admin, other_artifact):
    admin.app.state.service.drain()

    fault(load_model(admin, other_artifact), 503, "draining")


def test_a_dropped_model_is_freed_though_the_engine_has_nothing_else_to_do(admin, other_artifact):
    load_model(admin, other_artifact)
    model = weakref.ref(admin.app.state.service.registry.find("other"))
    features(admin, model="other")

    admin.delete("/admin/models/other")

    deadline = time.monotonic() + 10
    while model() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert model() is None
