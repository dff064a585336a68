import gc
import threading
import weakref

import pytest

from backbone import RegisterBorder, open_model
from backbone.errors import RefineryError
from service.errors import ConflictError, UnknownModelError
from service.models import ModelRegistry
from service.settings import SettingsError
from tests.service.plans import plan
from tests.support import tiny_artifact


@pytest.fixture(scope="module")
def other_artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture
def registry(settings):
    """A function that makes a registry without models."""

    def make(open_encoder=None, devices=("cpu",), **changes):
        return ModelRegistry(settings(**changes), devices, open_encoder)

    return make


class Opener:
    """Opens a tiny model, but waits for `gate`, and fails when a test wants it."""

    def __init__(self, artifact):
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.error = None
        self.num_opened = 0
        self._artifact = artifact

    def __call__(self, _spec, _settings, device):
        self.entered.set()
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        self.num_opened += 1
        return open_model(self._artifact, device=device, precision="fp32")


# --- finding


def test_the_first_model_is_the_default_and_others_are_found_by_name(
    registry, artifact, other_artifact
):
    models = registry()
    first = models.load("first", str(artifact))
    second = models.load("second", str(other_artifact))

    assert models.find(None) is models.find("first") is first
    assert models.find("second") is second
    assert models.models == (first, second)
    assert first.encoder.digest != second.encoder.digest


def test_an_unknown_model_is_refused_with_the_nearest_name(registry, artifact):
    models = registry()
    models.load("dinov2-small", str(artifact))

    with pytest.raises(UnknownModelError, match="'dinov2-smal' is served; did you mean 'dinov2-"):
        models.find("dinov2-smal")
    with pytest.raises(UnknownModelError, match="valid are dinov2-small") as caught:
        models.find("x" * 5000)
    assert len(caught.value.message) < 200


def test_a_model_is_ready_when_it_is_found(registry, artifact):
    model = registry(buckets="32x48").load("tiny", str(artifact))

    assert model.spec == str(artifact)
    assert model.buckets == ((64, 64), (32, 48))
    assert model.warm_up.tokens_per_second > 0
    assert model.graphs == (None,)
    assert len(model.encoders) == 1


def test_a_native_size_that_is_a_bucket_too_is_made_ready_once(registry, artifact):
    assert registry(buckets="64x64").load("tiny", str(artifact)).buckets == ((64, 64),)


def test_a_model_is_loaded_on_every_device(registry, artifact):
    opener = Opener(artifact)
    opener.gate.set()

    model = registry(opener, devices=("cpu", "cpu")).load("tiny", "spec")

    assert opener.num_opened == len(model.encoders) == len(model.graphs) == 2
    assert model.encoder is model.encoders[0]


# --- changing


def test_a_name_that_is_taken_is_refused_and_the_model_stays(registry, artifact, other_artifact):
    models = registry()
    first = models.load("tiny", str(artifact))

    with pytest.raises(ConflictError, match="'tiny' is served already; drop it first"):
        models.load("tiny", str(other_artifact))

    assert models.models == (first,)


def test_a_second_load_is_refused_while_one_runs_and_what_is_served_can_be_found(
    registry, artifact
):
    opener = Opener(artifact)
    opener.gate.set()
    models = registry(opener)
    first = models.load("first", "spec")
    opener.gate.clear()
    opener.entered.clear()
    loading = threading.Thread(target=models.load, args=("second", "spec"))
    loading.start()
    assert opener.entered.wait(10)

    with pytest.raises(ConflictError, match="another model is being loaded; retry"):
        models.load("third", "spec")

    assert models.models == (first,)
    opener.gate.set()
    loading.join(10)
    assert [model.name for model in models.models] == ["first", "second"]


def test_a_model_that_cannot_be_loaded_changes_nothing_and_others_can_be(registry, artifact):
    opener = Opener(artifact)
    opener.gate.set()
    models = registry(opener)
    first = models.load("first", "spec")
    opener.error = RuntimeError("planted failure")

    with pytest.raises(RuntimeError, match="planted"):
        models.load("second", "spec")

    assert models.models == (first,)
    opener.error = None
    assert models.load("second", "spec").name == "second"


def test_a_path_that_is_no_model_is_refused(registry, tmp_path):
    with pytest.raises(RefineryError):
        registry().load("tiny", str(tmp_path / "nothing"))


def test_a_dropped_model_is_not_found_and_its_name_is_free(registry, artifact, other_artifact):
    models = registry()
    models.load("first", str(artifact))
    models.load("second", str(other_artifact))

    models.drop("first")

    assert models.find(None).name == "second"
    with pytest.raises(UnknownModelError):
        models.find("first")
    with pytest.raises(UnknownModelError):
        models.drop("first")
    assert models.load("first", str(artifact)).name == "first"
    assert models.find(None).name == "second", "the default does not change by loading"


def test_the_last_model_is_not_dropped(registry, artifact):
    models = registry()
    models.load("tiny", str(artifact))

    with pytest.raises(ConflictError, match="'tiny' is the only model; load another one first"):
        models.drop("tiny")

    assert models.find(None).name == "tiny"


def test_a_dropped_model_is_freed_when_the_last_plan_that_names_it_is_gone(
    registry, artifact, other_artifact
):
    models = registry()
    models.load("first", str(artifact))
    models.load("second", str(other_artifact))
    encoder = weakref.ref(models.find("first").encoder)
    running = plan(model=models.find("first"))

    models.drop("first")
    gc.collect()
    assert encoder() is running.model.encoder, "a request that has begun can still be answered"

    del running
    gc.collect()
    assert encoder() is None


# --- sizes


def test_a_bucket_that_costs_too_much_is_refused_with_what_to_set(registry, artifact):
    models = registry(buckets="64x96", max_image_tokens=40, batch_tokens=40)

    with pytest.raises(SettingsError) as caught:
        models.load("tiny", str(artifact))

    message = str(caught.value)
    assert "64x96 px costs" in message
    assert "--max-image-tokens is 40" in message
    needed = message.split("costs ")[1].split()[0]
    assert f"set it, and --batch-tokens, to {needed} or more" in message
    enough = {"max_image_tokens": int(needed), "batch_tokens": int(needed)}
    assert registry(buckets="64x96", **enough).load("tiny", str(artifact))


def test_a_native_size_that_costs_too_much_is_refused_too(registry, artifact):
    with pytest.raises(SettingsError, match="64x64 px costs"):
        registry(max_image_tokens=10, batch_tokens=10).load("tiny", str(artifact))


def test_a_bucket_longer_than_any_size_that_may_be_asked_for_is_refused(registry, artifact):
    with pytest.raises(SettingsError, match="32x96 px is longer than --max-size 64: raise it"):
        registry(buckets="32x96", max_size=64).load("tiny", str(artifact))


# --- what decides the features


def test_the_fingerprint_is_that_of_all_that_decides_the_features(
    registry, artifact, other_artifact, tmp_path, monkeypatch
):
    border = tiny_artifact(tmp_path / "border", border=RegisterBorder(seed=8))

    def fingerprint(spec, name="tiny", **changes):
        return registry(**changes).load(name, str(spec)).fingerprint

    original = fingerprint(artifact)
    assert fingerprint(artifact, name="another") == original
    assert fingerprint(artifact, buckets="32x48", torch_threads=2) == original
    changed = {
        original,
        fingerprint(other_artifact),
        fingerprint(border),
        fingerprint(artifact, precision="bf16"),
    }
    monkeypatch.setattr("service.models.DECODER_VERSION", "another")
    changed.add(fingerprint(artifact))
    monkeypatch.undo()
    monkeypatch.setattr("service.models._version", lambda _: "another")
    changed.add(fingerprint(artifact))
    assert len(changed) == 6


def test_dropping_while_another_model_is_loaded_is_refused_at_once(registry, artifact):
    opener = Opener(artifact)
    opener.gate.set()
    models = registry(opener)
    models.load("first", "spec")
    models.load("second", "spec")
    opener.gate.clear()
    opener.entered.clear()
    loading = threading.Thread(target=models.load, args=("third", "spec"))
    loading.start()
    assert opener.entered.wait(10)

    with pytest.raises(ConflictError, match="a model is being loaded; retry"):
        models.drop("first")

    opener.gate.set()
    loading.join(10)
    models.drop("first")
    assert [model.name for model in models.models] == ["second", "third"]
