"""Towers of the hub, from a cache that is filled by hand: tests have no network."""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.trainer.evaluate.zeroshot import towers
from trainer.evaluate.zeroshot import ZeroshotError, find_tower, open_text_tower, read_head

HUB_ID = "owner/clip"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of a revision, with a CLIP model, in an otherwise empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    towers.write_clip(folder)
    return folder


def test_a_repository_is_found_in_the_cache(cached):
    tower = open_text_tower(find_tower(HUB_ID))

    expected = open_text_tower(find_tower(str(cached)))
    assert torch.equal(tower.embed(["a cat"]), expected.embed(["a cat"]))


def test_the_files_of_a_vision_towers_blocks_are_not_needed(cached):
    tensors = load_file(cached / "model.safetensors")
    (cached / "model.safetensors").unlink()
    blocks = {key: t for key, t in tensors.items() if key.startswith("vision_model.encoder.")}
    others = {key: t for key, t in tensors.items() if key not in blocks}
    save_file(others, cached / "model-2.safetensors")  # and model-1 was never downloaded
    index = dict.fromkeys(blocks, "model-1.safetensors")
    index |= dict.fromkeys(others, "model-2.safetensors")
    (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    files = find_tower(HUB_ID)

    assert open_text_tower(files).dim == towers.DIM
    assert read_head(files, "clip").channels == 32


def test_a_damaged_configuration_is_said(cached):
    (cached / "config.json").write_text("{")

    with pytest.raises(ZeroshotError, match="config.json cannot be read"):
        find_tower(HUB_ID)
