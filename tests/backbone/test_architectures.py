import logging

import pytest
import timm
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from backbone import Backbone, RegisterBorder, load_artifact, open_model, save_artifact
from backbone.encoder import DenseEncoder
from backbone.served import obstacle
from tests.support import tiny_backbone, tiny_vit

OURS = (
    "eva_clip_8b_patch14_448",
    "eva_clip_18b_patch14_224",
    "internvit_6b_patch14_448",
    "rice_large_patch14_560",
)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_any_grid_gives_one_token_per_patch(name, grid):
    backbone = tiny_backbone(name)

    features = backbone.encode(torch.randn(2, 3, grid[0] * 14, grid[1] * 14))

    assert features.tokens.shape == (2, grid[0] * grid[1], 32)
    assert features.prefix.shape == (2, 1, 32)


def tapped(backbone, layer=1):
    """Taps of a layer, the attention module, and its input."""
    inputs = []
    attn = backbone.vit.blocks[layer].attn
    handle = attn.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with backbone.tap_attention([layer]) as taps, torch.no_grad():
        backbone.encode(torch.randn(2, 3, 3 * 14, 4 * 14))
    handle.remove()
    return taps[layer], attn, inputs[0]


def test_taps_of_eva_clip_are_the_projections():
    (q, k), attn, x = tapped(tiny_backbone("eva_clip_8b_patch14_448"))

    assert q.shape == k.shape == (2, 2, 13, 16)
    torch.testing.assert_close(q.transpose(1, 2).flatten(2), attn.q_proj(x))
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), attn.k_proj(x))


def test_taps_of_internvit_are_normed_over_all_heads_and_split_by_heads():
    backbone = tiny_backbone("internvit_6b_patch14_448")
    with torch.no_grad():
        for block in backbone.vit.blocks:
            block.attn.q_norm.weight.normal_()
            block.attn.k_norm.weight.normal_()

    (q, k), attn, x = tapped(backbone)

    assert q.shape == k.shape == (2, 2, 13, 16)
    for tap, raw, norm in zip(
        (q, k), attn.qkv(x).chunk(3, -1), (attn.q_norm, attn.k_norm), strict=False
    ):
        normed = raw * (raw.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        torch.testing.assert_close(tap.transpose(1, 2).flatten(2), normed)


def test_taps_of_rice_are_rotated_as_its_attention_rotates_them():
    backbone = tiny_backbone("rice_large_patch14_560")

    (q, k), attn, x = tapped(backbone)

    rope = backbone.vit.rotary_table((3, 4))
    assert rope.shape == (13, 32)
    for tap, projection in ((q, attn.q_proj), (k, attn.k_proj)):
        split = projection(x).unflatten(-1, (2, 16)).transpose(1, 2)
        assert not torch.allclose(tap[:, :, 0], split[:, :, 0])  # the class token too
        torch.testing.assert_close(tap, apply_rot_embed_cat(split, rope, half=True))


def test_the_rotary_table_of_rice_stays_exact_in_half_precision():
    exact = tiny_backbone("rice_large_patch14_560")
    with torch.no_grad():  # a phase that bfloat16 has
        exact.vit.class_pos_emb.copy_(exact.vit.class_pos_emb.bfloat16())
    rounded = tiny_backbone("rice_large_patch14_560")
    rounded.vit.class_pos_emb = exact.vit.class_pos_emb

    table = rounded.to(torch.bfloat16).vit.rotary_table((40, 42))

    assert table.dtype == torch.float32
    torch.testing.assert_close(table, exact.vit.rotary_table((40, 42)))


@pytest.mark.parametrize("name", OURS)
def test_all_of_them_are_served_with_the_projects_attention(name, caplog):
    with caplog.at_level(logging.WARNING):
        DenseEncoder(tiny_backbone(name), digest="", precision="fp32")

    assert obstacle(tiny_vit(name)) is None
    assert caplog.records == []


@pytest.mark.parametrize("name", OURS)
def test_an_artifact_is_built_again_and_served(tmp_path, name):
    backbone = Backbone(tiny_vit(name), name=name, dense_norm=False)
    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(seed=3), model_card="")
    images = torch.randint(0, 256, (2, 3, 56, 70), dtype=torch.uint8)

    loaded = load_artifact(tmp_path / "a").backbone
    (served,) = open_model(tmp_path / "a", precision="fp32").encode(images)
    (expected,) = open_model(tmp_path / "a", precision="fp32").encode(images, registers=True)

    assert type(loaded.vit) is type(backbone.vit)
    assert loaded.dense_norm is False
    pixels = torch.randn(1, 3, 56, 70)
    assert torch.equal(loaded.encode(pixels).tokens, backbone.encode(pixels).tokens)
    torch.testing.assert_close(served.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert served.grid == (4, 5)


@pytest.mark.parametrize("name", OURS)
def test_timm_loads_their_folders_once_they_are_registered(tmp_path, name):
    backbone = tiny_backbone(name)
    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(), model_card="")
    pixels = torch.randn(1, 3, 56, 56)

    vit = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()

    torch.testing.assert_close(vit.forward_features(pixels)[:, 1:], backbone.encode(pixels).tokens)
    # ... and it is a backbone that is taken as its constructor's entry says.
    assert Backbone.load(tmp_path / "a").dense_norm is False
