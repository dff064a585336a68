import pytest
import timm
import torch

from backbone import Backbone, DenseFeatures
from backbone.errors import ImageSizeError, ModelError, ModelNotFoundError
from tests.support import tiny_backbone, tiny_vit

# One of every attention class and position embedding that the loaders accept.
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_dinov3": {},  # Eva, fused projections without bias, rotary
    "vit_small_patch16_dinov3_qkvb": {},  # Eva, fused projections with q and v bias
    "eva02_base_patch16_clip_224": {},  # Eva, separate projections
    "vit_pe_spatial_tiny_patch16_512": {},  # rotary attention, no final norm
    "vit_base_patch16_siglip_224": {},  # no class token
    "vit_base_patch14_reg4_dinov2": {},  # class token and four native registers
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
def test_any_grid_of_every_family_gives_one_token_per_patch(name, grid):
    backbone = tiny_backbone(name)
    p = backbone.patch_size

    features = backbone.encode(torch.randn(2, 3, grid[0] * p, grid[1] * p))

    assert features.grid == grid
    assert features.tokens.shape == (2, grid[0] * grid[1], 32)
    assert features.prefix.shape == (2, backbone.num_prefix_tokens, 32)
    assert features.maps.shape == (2, 32, *grid)


def test_tokens_are_those_of_timm():
    vit = tiny_vit()
    pixels = torch.randn(2, 3, 64, 64)

    features = Backbone(vit, name="tiny").encode(pixels)

    whole = vit.forward_features(pixels)
    torch.testing.assert_close(features.tokens, whole[:, 1:])
    torch.testing.assert_close(features.prefix, whole[:, :1])


def test_the_dense_norm_is_applied_only_when_asked_for():
    vit = tiny_vit()
    pixels = torch.randn(1, 3, 64, 64)

    raw = Backbone(vit, name="tiny", dense_norm=False).encode(pixels).tokens
    normed = Backbone(vit, name="tiny", dense_norm=True).encode(pixels).tokens

    torch.testing.assert_close(vit.norm(raw), normed)
    assert not torch.allclose(raw, normed)


def test_layers_come_in_the_order_asked_for():
    backbone = tiny_backbone(depth=3)
    pixels = torch.randn(1, 3, 64, 64)

    last, first, again = backbone.encode_layers(pixels, [-1, 0, 2])

    torch.testing.assert_close(last.tokens, again.tokens)
    torch.testing.assert_close(first.tokens, backbone.encode_layers(pixels, [0])[0].tokens)
    assert not torch.allclose(first.tokens, last.tokens)


@pytest.mark.parametrize("layer", [2, -3, 100])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(ValueError, match=rf"layer {layer} does not exist.*2 blocks"):
        tiny_backbone().encode_layers(torch.randn(1, 3, 64, 64), [layer])


def test_images_between_patches_are_refused_with_the_nearest_size():
    with pytest.raises(ImageSizeError, match="60x64 px.*resize to 64x64"):
        tiny_backbone().encode(torch.randn(1, 3, 60, 64))


@pytest.mark.parametrize("name", FAMILIES)
def test_tapped_queries_and_keys_are_the_projections(name):
    backbone = tiny_backbone(name)
    inputs = []
    block = backbone.vit.blocks[1]
    block.attn.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    p = backbone.patch_size

    with backbone.tap_attention([-1]) as taps, torch.no_grad():
        backbone.encode(torch.randn(2, 3, 3 * p, 4 * p))

    q, k = taps[1]
    tokens = 12 + backbone.num_prefix_tokens
    assert q.shape == k.shape == (2, 2, tokens, 16)
    attn, x = block.attn, inputs[0]
    if getattr(attn, "qkv", None) is not None:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        projected = torch.nn.functional.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    else:
        projected = (attn.q_proj(x), attn.k_proj(x))
    torch.testing.assert_close(q.transpose(1, 2).flatten(2), projected[0])
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), projected[1])


def test_nothing_is_recorded_outside_the_with():
    backbone = tiny_backbone()
    pixels = torch.randn(1, 3, 64, 64)
    with backbone.tap_attention([0]) as taps:
        backbone.encode(pixels)
    recorded = taps[0][0].clone()

    backbone.encode(torch.randn(1, 3, 64, 64))

    assert torch.equal(taps[0][0], recorded)
    assert not backbone.vit.blocks[0].attn.q_norm._forward_hooks


def test_hooks_go_even_when_the_forward_fails():
    backbone = tiny_backbone()

    with pytest.raises(ImageSizeError), backbone.tap_attention([0]):
        backbone.encode(torch.randn(1, 3, 3, 3))

    assert not backbone.vit.blocks[0].attn.q_norm._forward_hooks


def test_a_layer_that_was_not_tapped_is_named():
    backbone = tiny_backbone()
    with backbone.tap_attention([0]) as taps:
        backbone.encode(torch.randn(1, 3, 64, 64))

    with pytest.raises(KeyError, match="layer 1 was not recorded"):
        taps[1]


def test_calling_fused_projections_changes_no_bit():
    name = "vit_small_patch16_dinov3_qkvb"
    vit = tiny_vit(name)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for block in vit.blocks:  # biases start at zero: give them something to do
            block.attn.q_bias.normal_()
            block.attn.v_bias.normal_()
    before = vit.forward_features(pixels)

    after = Backbone(vit, name=name).vit.forward_features(pixels)

    assert torch.equal(before, after)


def test_dense_features_check_their_shape():
    with pytest.raises(ValueError, match=r"expected \[B, 6, C\] of a 2x3 grid"):
        DenseFeatures(torch.zeros(1, 5, 4), (2, 3), 16, torch.zeros(1, 0, 4))


def test_loads_a_timm_folder_by_path_and_by_prefix(tmp_path):
    from timm.models._hub import save_for_hf

    vit = tiny_vit()
    save_for_hf(vit, tmp_path / "model", safe_serialization=True)
    pixels = torch.randn(1, 3, 48, 80)

    for spec in (tmp_path / "model", f"local-dir:{tmp_path / 'model'}"):
        loaded = Backbone.load(spec)
        torch.testing.assert_close(
            loaded.encode(pixels).tokens, vit.forward_features(pixels)[:, 1:]
        )


@pytest.mark.slow
def test_loads_a_weights_file_through_timms_converter(tmp_path):
    # given a checkpoint in the layout of Meta's own DINOv2 release: it has a mask token
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(0)
    vit = timm.create_model(name, pretrained=False, num_classes=0)
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "weights.pth")

    loaded = Backbone.load(name, weights=tmp_path / "weights.pth")

    pixels = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.encode(pixels).tokens, vit.forward_features(pixels)[:, 1:]
        )


def test_random_weights_come_only_when_asked_for():
    with pytest.raises(ModelNotFoundError, match="--random-weights"):
        Backbone.load("vit_tiny_patch16_224.augreg_in21k")
    backbone = Backbone.load("vit_tiny_patch16_224.augreg_in21k", random_weights=True)
    assert backbone.embed_dim == 192
    assert backbone.name == "vit_tiny_patch16_224"  # the tag is of weights that it does not have


@pytest.mark.slow
def test_a_model_without_published_weights_is_named():
    with pytest.raises(
        ModelNotFoundError, match="timm knows no weights for vit_base_patch16_gap_224"
    ):
        Backbone.load("vit_base_patch16_gap_224")


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(ModelNotFoundError, match="did you mean vit_tiny_patch16_224"):
        Backbone.load("vit_tyni_patch16_224", random_weights=True)


def test_other_families_are_refused():
    with pytest.raises(ModelError, match="VisionTransformer or Eva family"):
        Backbone.load("resnet10t", random_weights=True)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        Backbone.load(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        Backbone.load("vit_tiny_patch16_224", weights=tmp_path / "none.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "other.pth")

    with pytest.raises(ModelError, match=r"other\.pth cannot be loaded as vit_tiny"):
        Backbone.load("vit_tiny_patch16_224", weights=tmp_path / "other.pth")
