"""Checkpoints of the models that timm lacks, in their published layouts."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbone import Backbone
from backbone.checkpoints import fill, find_plan, layouts, open_checkpoint, to_published
from backbone.errors import ModelError
from tests.backbone.checkpoints.eva_clip_reference import EvaClipReference
from tests.backbone.checkpoints.published import CASES, OURS, tensors_of

CLOSE = {"rtol": 0, "atol": 1e-5}
EVA = {"8b": ("eva_clip_8b_patch14_448", False), "18b": ("eva_clip_18b_patch14_224", True)}


def read(path, name, *, dropped_blocks=0, **changes):
    with torch.device("meta"):
        vit = timm.create_model(name, **{"img_size": 56, **OURS, **changes}).eval()
    checkpoint = open_checkpoint(path)
    plan = find_plan(vit, checkpoint, model=name, dropped_blocks=dropped_blocks)
    fill(vit, checkpoint, plan, model=name, dtype=torch.float32)
    return plan.layout, Backbone(vit, name=name, dense_norm=False)


def all_tokens(backbone, pixels):
    with torch.no_grad():
        features = backbone.encode(pixels)
    return torch.cat([features.prefix, features.tokens], dim=1)


@pytest.mark.parametrize("size", EVA)
def test_eva_clip_in_transformers_names(tmp_path, size):
    name, post_norm = EVA[size]
    torch.manual_seed(0)
    reference = EvaClipReference(post_norm=post_norm).eval()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    pixels = torch.randn(2, 3, 56, 56)

    layout, backbone = read(tmp_path, name)

    assert layout is layouts.EVA_CLIP
    with torch.no_grad():
        expected = reference(pixels)
    torch.testing.assert_close(all_tokens(backbone, pixels), expected, **CLOSE)
    published = to_published(backbone.vit.state_dict(), layout, depth=2, prefix="vision_model.")
    for key, value in published.items():
        assert torch.equal(value, reference.state_dict()[key]), key
    assert len(published) == sum(k.startswith("vision_model.") for k in reference.state_dict())


@pytest.mark.parametrize("size", EVA)
@pytest.mark.parametrize("wrapper", [None, "module"])
def test_eva_clip_in_its_authors_names(tmp_path, size, wrapper):
    name, post_norm = EVA[size]
    torch.manual_seed(0)
    reference = EvaClipReference(post_norm=post_norm).eval()
    tensors = reference.in_the_authors_names()
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "EVA_CLIP.pt")
    pixels = torch.randn(2, 3, 56, 56)

    layout, backbone = read(tmp_path / "EVA_CLIP.pt", name)

    assert layout is layouts.EVA_ORIGINAL
    with torch.no_grad():
        expected = reference(pixels)
    torch.testing.assert_close(all_tokens(backbone, pixels), expected, **CLOSE)
    published = to_published(backbone.vit.state_dict(), layout, depth=2, prefix="visual.")
    assert published.keys() == {k for k in tensors if "visual." in k} - {"visual.head.weight"}
    for key, value in published.items():
        assert torch.equal(value, tensors[key]), key


AUTHORS_NAMES = {
    "encoder.layer.": "encoder.layers.",
    "attention.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "projection_layer": "proj",
    "patch_embeddings.projection": "patch_embedding",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
}


def internvit_in_its_authors_names(folder, depth=2):
    """A tiny InternViT as OpenGVLab writes it, and the transformers model that it is."""
    case = CASES["internvl"]
    case = replace(case, config=case.config | {"num_hidden_layers": depth})
    model = case.write(folder / "theirs")
    theirs, ours = tensors_of(folder / "theirs"), {}
    for key, value in theirs.items():
        name = key
        for old, new in AUTHORS_NAMES.items():
            name = name.replace(old, new)
        if "_proj" not in name:
            ours[name] = value
    for number in range(depth):
        parts = [theirs[f"encoder.layer.{number}.attention.{n}_proj.weight"] for n in "qkv"]
        ours[f"encoder.layers.{number}.attn.qkv.weight"] = torch.cat(parts)
    save_file(ours, folder / "model.safetensors")
    return model, ours


def test_internvit_in_its_authors_names(tmp_path):
    model, published = internvit_in_its_authors_names(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)

    layout, backbone = read(tmp_path, "internvit_6b_patch14_448")

    assert layout is layouts.INTERNVIT
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    torch.testing.assert_close(all_tokens(backbone, pixels), expected, **CLOSE)
    again = to_published(backbone.vit.state_dict(), layout, depth=2)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[key], published[key]) for key in again)


def test_the_last_blocks_of_a_checkpoint_are_dropped(tmp_path):
    model, _ = internvit_in_its_authors_names(tmp_path, depth=5)
    pixels = torch.randn(2, 3, 56, 56)

    _, backbone = read(tmp_path, "internvit_6b_patch14_224", dropped_blocks=3)

    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(all_tokens(backbone, pixels), expected, **CLOSE)


def test_a_checkpoint_that_was_cut_before_is_not_cut_again(tmp_path):
    internvit_in_its_authors_names(tmp_path, depth=2)

    with pytest.raises(ModelError, match=r"lacks 3 keys, the first block 2 \(to be left out\)"):
        read(tmp_path, "internvit_6b_patch14_224", dropped_blocks=3)


def test_blocks_that_are_too_many_are_an_error_unless_they_are_to_be_dropped(tmp_path):
    internvit_in_its_authors_names(tmp_path, depth=5)

    with pytest.raises(ModelError, match=r"no place for, the first encoder\.layers\.2\."):
        read(tmp_path, "internvit_6b_patch14_448")
