"""The hub's cache, filled by hand: tests have no network."""

import json

import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from backbone import Backbone
from backbone.checkpoints import download, hub
from backbone.errors import ModelNotFoundError
from tests.backbone.checkpoints.test_loading import (  # noqa: F401  # the fixture is used
    NAME,
    published,
    tiny_catalogue,
    write_shards,
)

HUB_ID = "BAAI/EVA-CLIP-8B-448"


def revision_folder(cache, hub_id):
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of a revision in an otherwise empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return revision_folder(tmp_path, HUB_ID)


def test_a_catalogue_name_finds_its_weights_in_the_cache(cached):
    _, tensors = published()
    write_shards(cached, tensors, kind="bin")

    backbone = Backbone.load(NAME)

    expected = tensors["vision_model.post_layernorm.weight"]
    assert torch.equal(backbone.vit.norm.weight, expected)
    assert backbone.origin.source == HUB_ID
    assert backbone.name == "eva_clip_8b_patch14_448"


def test_safetensors_are_preferred_to_pickles(cached):
    _, tensors = published()
    write_shards(cached, tensors, kind="bin")
    save_file(tensors, cached / "model.safetensors")

    assert download(HUB_ID) == cached
    assert hub.WEIGHTS_FILES[0] == "model.safetensors"


@pytest.mark.usefixtures("cached")
def test_without_network_and_cache_it_says_what_to_do():
    with pytest.raises(
        ModelNotFoundError,
        match=rf"weights of {HUB_ID} are not here.*hf download {HUB_ID}.*give the folder",
    ):
        Backbone.load(NAME)


def test_only_the_shards_of_the_vision_tower_are_downloaded(cached, monkeypatch):
    weight_map = {
        "vision_model.embeddings.class_embedding": "pytorch_model-00001-of-00003.bin",
        "visual_projection.weight": "pytorch_model-00002-of-00003.bin",
        "text_model.embeddings.weight": "pytorch_model-00003-of-00003.bin",
        "vision_model.post_layernorm.weight": "pytorch_model-00002-of-00003.bin",
    }
    index = cached / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    asked = {}

    def snapshot(hub_id, **arguments):
        asked.update({"id": hub_id, **arguments})
        return str(cached)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)

    assert download(HUB_ID) == cached
    assert asked == {
        "id": HUB_ID,
        "allow_patterns": [
            "pytorch_model.bin.index.json",
            "pytorch_model-00001-of-00003.bin",
            "pytorch_model-00002-of-00003.bin",
        ],
    }


def test_a_gated_repository_says_that_a_licence_must_be_accepted(monkeypatch):
    import httpx2

    def refuse(*_arguments, **_settings):
        response = httpx2.Response(403, request=httpx2.Request("GET", "https://example.org"))
        raise errors.GatedRepoError("gated", response=response)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)

    with pytest.raises(ModelNotFoundError, match=r"GatedRepoError.*accept it.*hf auth login"):
        download(HUB_ID)


def test_timms_own_file_is_read_in_another_precision_without_timm(tmp_path, monkeypatch):
    name = "vit_pe_spatial_tiny_patch16_512.fb"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    save_file(state, revision_folder(tmp_path, f"timm/{name}") / "model.safetensors")

    backbone = Backbone.load(name.removesuffix(".fb"), dtype=torch.bfloat16)

    assert backbone.name == backbone.origin.source == name
    loaded = backbone.vit.state_dict()
    assert all(torch.equal(loaded[key], value.bfloat16()) for key, value in state.items())


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timms_weights_out_of_reach_are_named(dtype):
    name = "vit_pe_spatial_tiny_patch16_512.fb"
    with pytest.raises(ModelNotFoundError, match=rf"weights of {name} are not here and the hub"):
        Backbone.load(name, dtype=dtype)
