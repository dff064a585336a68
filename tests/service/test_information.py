"""What `GET /info` says, and that it is true."""

import threading
from importlib import metadata

import pytest
from safetensors.numpy import load
from starlette.testclient import TestClient

from backbone import open_model
from service.app import create_app
from service.information import project_version
from tests.service.conftest import wait_until_ready
from tests.support import encoded, noise_image, tiny_artifact

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))


@pytest.fixture(scope="module")
def info(client):
    return client.get("/info").json()


def post(client, accept="application/x-safetensors", **query):
    headers = PNG | {"accept": accept}
    return client.post("/features", content=PHOTO, headers=headers, params=query)


def test_the_model_is_described_as_it_is(info, artifact):
    encoder = open_model(artifact, precision="fp32")

    assert info["model"] == {
        "name": artifact.name,
        "backbone": "vit_tiny_patch16_224",
        "digest": encoder.digest,
        "is_refined": True,
        "patch_size": 16,
        "embed_dim": 32,
        "num_layers": 2,
        "native_size": [64, 64],
        "buckets": ["64x64"],
        "register_width": encoder.register_width(64, 64),
        "precision": "fp32",
        "devices": ["cpu"],
    }
    assert info["models"] == [info["model"]]


def test_several_models_are_listed_and_the_first_is_the_default(serve, artifact, tmp_path):
    other = tiny_artifact(tmp_path / "other", seed=1)

    with serve(model=(f"one={artifact}", f"two={other}")) as client:
        info = client.get("/info").json()
        assert [model["name"] for model in info["models"]] == ["one", "two"]
        assert info["model"] == info["models"][0]
        for model in info["models"]:
            answer = post(client, model=model["name"])
            assert answer.headers["x-model-digest"] == model["digest"]
        assert post(client).headers["x-model-digest"] == info["model"]["digest"]


def test_a_backbone_that_was_not_refined_is_told_apart(serve):
    spec = "vit_tiny_patch16_224"
    with serve(model=spec, random_weights=True, max_image_tokens=300) as client:
        model = client.get("/info").json()["model"]

    assert (model["is_refined"], model["register_width"]) == (False, 0)
    assert (model["name"], model["native_size"]) == (spec, [224, 224])


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        ("max_images", {"max_images": 3}),
        ("max_size", {"max_size": 80}),
        ("max_layers", {"max_layers": 1}),
        ("max_body_bytes", {"max_body_bytes": 12345}),
        ("max_queue_tokens", {"max_queue_tokens": 54321}),
        ("only_buckets", {"only_buckets": True}),
        ("request_seconds", {"request_seconds": 7.5}),
        ("url_hosts", {"allow_url_hosts": ("images.example",)}),
    ],
)
def test_limits_are_those_of_the_settings(serve, limit, changes):
    with serve(**changes) as client:
        found = client.get("/info").json()["limits"][limit]

    wanted = next(iter(changes.values()))
    assert found == (list(wanted) if isinstance(wanted, tuple) else wanted)


def test_the_longest_size_is_the_one_that_is_still_taken(serve):
    with serve(max_size=80) as client:
        longest = client.get("/info").json()["limits"]["max_size"]

        assert post(client, size=longest).status_code == 200
        assert post(client, size=longest + 16).status_code == 422


def test_the_bound_on_waiting_work_follows_the_measured_rate(client):
    service = client.app.state.service

    limit = client.get("/info").json()["limits"]["max_queue_tokens"]

    assert limit == service.admission.limit >= 2 * service.settings.batch_tokens


@pytest.mark.parametrize(("name", "option"), [("dtypes", "dtype"), ("layouts", "layout")])
def test_every_choice_that_is_listed_is_taken(info, client, name, option):
    assert info[name]
    for choice in info[name]:
        assert post(client, **{option: choice}).status_code == 200, choice


def test_everything_that_can_be_included_is_listed_and_sent(info, client):
    assert info["includes"] == ["registers", "cls", "spurious"]
    assert info["includes"] == [
        choice
        for choice in info["includes"]
        if f"{choice}.0" in load(post(client, include=choice).content)
    ]


def test_every_response_type_that_is_listed_is_sent(info, client):
    assert info["response_types"][0] == "application/x-safetensors"
    for media in info["response_types"]:
        answer = post(client, accept=media)
        assert answer.status_code == 200, media
        assert answer.headers["content-type"] == media


def test_every_request_type_that_is_listed_is_read(info, client):
    for media in info["request_types"]:
        answer = client.post("/features", content=b"", headers={"content-type": media})
        code = answer.json()["error"]["code"]
        assert answer.status_code in (400, 415), media
        assert code != "unsupported_content_type", media


def test_every_image_format_that_is_listed_is_read(info, client):
    can_write = {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} & set(info["image_formats"])
    assert {"PNG", "JPEG"} <= can_write
    for format in can_write:
        body = encoded(noise_image(64, 64), format)
        headers = {"content-type": "application/octet-stream"}
        assert client.post("/features", content=body, headers=headers).status_code == 200, format


def test_the_largest_pooling_and_boxes_are_those_that_are_still_taken(info, client):
    pool, box_size = info["limits"]["max_pool"], info["limits"]["max_box_size"]

    assert post(client, pool=pool).status_code == 200
    assert post(client, pool=pool + 1).status_code == 422
    assert post(client, boxes="0,0,9,9", box_size=box_size).status_code == 200
    assert post(client, boxes="0,0,9,9", box_size=box_size + 1).status_code == 422


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_the_kind_of_cache_is_told(serve, cache):
    with serve(cache=cache) as client:
        assert client.get("/info").json()["cache"] == cache


def test_the_tolerance_bounds_what_the_warm_up_measured(info):
    tolerance = info["tolerance"]

    assert 0 <= tolerance["measured_relative_error"] <= tolerance["max_relative_error"] < 1
    assert 0 < tolerance["min_cosine"] <= tolerance["measured_cosine"] <= 1 + 1e-6


def test_versions_are_those_that_are_installed(info):
    assert info["version"] == project_version()
    assert info["versions"]["torch"] == metadata.version("torch")
    assert all(info["versions"].values())


def test_it_is_not_told_before_the_models_are_loaded(settings, artifact):
    gate = threading.Event()

    def open_encoder(_spec, _settings, device):
        assert gate.wait(10)
        return open_model(artifact, device=device, precision="fp32")

    with TestClient(create_app(settings(), open_encoder)) as client:
        early = client.get("/info")
        gate.set()
        wait_until_ready(lambda: client.get("/readyz").status_code)

        assert early.status_code == 503
        assert early.json()["error"]["code"] == "not_ready"
        assert client.get("/info").status_code == 200


def test_it_is_still_told_while_the_service_shuts_down(serve):
    with serve() as client:
        client.app.state.service.drain()

        assert client.get("/info").status_code == 200


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def is_missing(_name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr("service.information.metadata.version", is_missing)

    assert project_version() == "0+checkout"


def test_a_service_that_could_not_load_its_model_says_that_it_is_not_ready(settings, tmp_path):
    app = create_app(settings(model=str(tmp_path / "nothing")))
    with TestClient(app) as client:
        wait_until_ready(lambda: 200 if client.get("/livez").status_code == 503 else 0)

        response = client.get("/info")

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
