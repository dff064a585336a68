import functools
import hashlib
import json
import logging
import time

import httpx2 as httpx
import pytest
import torch
from starlette.testclient import TestClient

from backbone import Backbone, RegisterBorder, open_model, save_artifact
from service.app import create_app
from service.settings import Settings
from tests.support import ROOT, tiny_artifact, tiny_backbone
from tests.trainer.refining import model_folder
from trainer.evaluate.errors import SubjectError
from trainer.evaluate.served import ServedSubject, ServiceConnection
from trainer.evaluate.subjects import LocalSubject, open_subjects

DEMO, RAW = ROOT / "models" / "demo", ROOT / "models" / "demo-pretrained"
HERE = {"device": "cpu", "precision": "fp32"}


def pictures(height=32, width=48, count=2):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def refined_from(folder, name, **section):
    """A tiny artifact whose recipe names what it was refined from."""
    recipe = {"backbone": {"name": str(name), "weights": None, "random_weights": False, **section}}
    return tiny_artifact(folder / "refined", recipe=recipe)


def test_the_raw_backbone_comes_from_the_manifest_and_stands_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the recipe's path counts from above the artifact

    raw, refined = open_subjects(str(DEMO), **HERE)

    assert (raw.name, refined.name) == ("raw", "refined")
    assert raw.spec.endswith("models/demo-pretrained")
    assert raw.digest == open_model(RAW, **HERE).digest
    assert raw.key != refined.key


def test_a_model_that_is_not_an_artifact_is_measured_alone():
    (raw,) = open_subjects(str(RAW), **HERE)

    assert raw.name == "raw"


def test_baseline_none_measures_the_artifact_alone():
    (refined,) = open_subjects(str(DEMO), "none", **HERE)

    assert refined.name == "refined"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "no/such/backbone"}, "refined from no/such/backbone, which cannot be loaded"),
        ({"random_weights": True}, "refined from random weights"),
        ({"name": None}, "does not say what it was refined from"),
    ],
)
def test_an_artifact_whose_raw_backbone_is_not_there_asks_for_one(tmp_path, section, message):
    artifact = refined_from(tmp_path, RAW)
    manifest = json.loads((artifact / "refinery.json").read_text())
    manifest["recipe"]["backbone"] |= section
    (artifact / "refinery.json").write_text(json.dumps(manifest))

    with pytest.raises(SubjectError, match=message) as raised:
        open_subjects(str(artifact), **HERE)

    assert "--baseline PATH, or --baseline none" in str(raised.value)


def test_another_raw_backbone_than_the_one_refined_is_warned_of(tmp_path, caplog):
    raw = tiny_backbone(seed=3)
    save_artifact(tmp_path / "raw", raw, border=RegisterBorder(), model_card="")
    (tmp_path / "raw" / "refinery.json").unlink()
    artifact = refined_from(tmp_path, tmp_path / "raw")
    manifest = json.loads((artifact / "refinery.json").read_text())
    manifest["origin"] = {
        "source": "raw",
        "layout": "timm",
        "dtype": "float32",
        "digest": "0" * 64,
    }
    (artifact / "refinery.json").write_text(json.dumps(manifest))

    open_subjects(str(artifact), **HERE)

    assert "has other weights" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_raw_backbones_of_one_name_the_one_that_was_refined_counts(
    tmp_path, monkeypatch, caplog, precision
):
    known = Backbone.load(model_folder(tmp_path / "project" / "raw")).origin
    model_folder(tmp_path / "elsewhere" / "raw", seed=3)
    artifact = refined_from(tmp_path / "project" / "runs", "raw")
    manifest = json.loads((artifact / "refinery.json").read_text())
    manifest["origin"] = known.model_dump()
    (artifact / "refinery.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path / "elsewhere")

    raw, _ = open_subjects(str(artifact), device="cpu", precision=precision)

    # In another precision than the manifest's nobody knows: the current folder is first.
    expected = str(tmp_path / "project" / "raw") if precision == "fp32" else "raw"
    assert raw.spec == expected
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_raw_backbone_that_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    artifact = refined_from(tmp_path / "copies", "models/raw")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    with pytest.raises(SubjectError) as raised:
        open_subjects(str(artifact), **HERE)

    looked = f"from {tmp_path / 'here'}, then from {tmp_path / 'copies'} and every folder above it"
    assert looked in str(raised.value)


@pytest.mark.parametrize("baseline", [None, str(RAW)])
def test_a_baseline_is_meant_to_be_raw_and_no_warning_says_so(caplog, baseline):
    open_subjects(str(DEMO), baseline, **HERE)

    assert "is not an artifact" not in caplog.text


def test_the_key_holds_all_that_decides_the_features(tmp_path):
    first = tiny_artifact(tmp_path / "a")
    others = [
        tiny_artifact(tmp_path / "b", seed=1),
        tiny_artifact(tmp_path / "c", border=RegisterBorder(seed=8)),
    ]
    encoder = open_model(first, **HERE)

    keys = {LocalSubject(open_model(each, **HERE)).key for each in (first, *others)}
    keys |= {LocalSubject(encoder, width).key for width in (1, 2)}
    keys.add(LocalSubject(open_model(first, device="cpu", precision="bf16")).key)

    assert len(keys) == 6
    assert LocalSubject(encoder).key == LocalSubject(open_model(first, **HERE)).key


def test_local_tokens_are_float32_and_can_be_trained_on(tmp_path):
    encoder = open_model(tiny_artifact(tmp_path / "a"), device="cpu", precision="bf16")

    tokens = LocalSubject(encoder).encode(pictures())

    assert (tokens.dtype, tuple(tokens.shape)) == (torch.float32, (2, 6, 32))
    (tokens * torch.ones(32, requires_grad=True)).sum().backward()


KEY = "k" * 43


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A service of the demonstration model, refined and raw, that takes two images at a time."""
    keys = tmp_path_factory.mktemp("service") / "keys.txt"
    keys.write_text(f"caller {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    settings = Settings(
        model=(f"demo={DEMO}", f"raw={RAW}"),
        precision="fp32",
        max_images=2,
        decode_threads=1,
        torch_threads=1,
        api_key_file=keys,
    )
    with TestClient(create_app(settings)) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, "the service did not get ready"
            time.sleep(0.02)
        yield client


@pytest.fixture
def service(client, monkeypatch):
    """Its URL; requests go to the app in this process."""

    def forward(request):
        answer = client.request(
            request.method, str(request.url), headers=request.headers, content=request.read()
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    connection = functools.partial(ServiceConnection, transport=httpx.MockTransport(forward))
    monkeypatch.setattr("trainer.evaluate.subjects.ServiceConnection", connection)
    return "http://testserver"


def test_served_features_are_those_of_the_same_model_here(service):
    served = open_subjects(None, url=service, api_key=KEY)
    local = open_subjects(str(DEMO), str(RAW), **HERE)
    images = pictures(count=5)  # more than the service takes at once

    for there, here in zip(served, local, strict=True):
        assert (there.name, there.digest) == (here.name, here.digest)
        assert (there.patch_size, there.native_size) == (here.patch_size, here.native_size)
        # Both in float32; a batch of another size adds up in another order.
        torch.testing.assert_close(there.encode(images), here.encode(images), rtol=1e-3, atol=1e-4)
    assert served[0].key != served[1].key
    assert served[0].key == open_subjects("raw", url=service, api_key=KEY)[0].key


def test_the_register_width_reaches_the_service(service):
    served = open_subjects("demo", "none", url=service, api_key=KEY, register_width=2)[0]
    local = LocalSubject(open_model(DEMO, **HERE), 2)

    torch.testing.assert_close(
        served.encode(pictures()), local.encode(pictures()), rtol=1e-3, atol=1e-4
    )


def test_a_model_that_is_not_served_is_answered_with_those_that_are(service):
    with pytest.raises(SubjectError, match=r"'demmo' is served; .*: demo \(refined\), raw \(raw\)"):
        open_subjects("demmo", url=service, api_key=KEY)


@pytest.mark.parametrize(
    ("key", "message"), [(None, "it wants an API key"), ("x" * 43, "the key was refused")]
)
def test_a_service_that_wants_a_key_says_how_to_give_one(service, key, message):
    with pytest.raises(SubjectError, match=f"{message} .401.; give --api-key-file"):
        open_subjects("demo", url=service, api_key=key)


def test_what_the_service_refuses_is_told_in_its_words(service):
    subject = open_subjects("demo", "none", url=service, api_key=KEY)[0]

    with pytest.raises(SubjectError, match=r"size .* 16 px patches.*422 invalid_option"):
        subject.encode(pictures(height=30))


def test_a_service_that_is_not_there_is_named():
    with pytest.raises(SubjectError, match=r"127\.0\.0\.1:9/info cannot be reached"):
        open_subjects("demo", url="http://127.0.0.1:9")


def test_a_url_without_scheme_is_refused():
    with pytest.raises(SubjectError, match="write it as http://"):
        open_subjects("demo", url="127.0.0.1:8000")


def test_another_server_is_no_feature_service():
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"name": "shop"}))

    with pytest.raises(SubjectError, match="does not answer as a feature service"):
        ServiceConnection("http://shop", transport=transport).info()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_no_sooner_than_it_said(status):
    answers = iter([httpx.Response(status, headers={"retry-after": "3"}), httpx.Response(200)])
    pauses = []
    connection = ServiceConnection(
        "http://busy", transport=httpx.MockTransport(lambda _: next(answers)), sleep=pauses.append
    )

    assert connection.ask("GET", "/info").status_code == 200
    (pause,) = pauses
    assert 3 <= pause < 4


def test_a_service_that_stays_busy_is_given_up_with_its_reason():
    error = {"error": {"code": "overloaded", "message": "too much is waiting"}}
    transport = httpx.MockTransport(lambda _: httpx.Response(429, json=error))
    pauses = []

    with pytest.raises(
        SubjectError, match=r"too much is waiting \(429 overloaded\); gave up after"
    ):
        ServiceConnection("http://busy", transport=transport, sleep=pauses.append).info()

    assert len(pauses) == 8


def test_weights_that_change_underway_are_noticed(client):
    info = client.get("/info", headers={"x-api-key": KEY})

    def answer(request):
        if request.url.path == "/info":
            return httpx.Response(200, content=info.content)
        return httpx.Response(200, headers={"x-model-digest": "0" * 64})

    connection = ServiceConnection("http://changed", transport=httpx.MockTransport(answer))
    subject = ServedSubject(connection, "demo")

    with pytest.raises(SubjectError, match="the model was replaced"):
        subject.encode(pictures())
