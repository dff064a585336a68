import pytest
import torch

from backbone import Backbone, DenseEncoder, RegisterBorder, open_model
from backbone.errors import ModelError
from backbone.registers import strip
from backbone.value_path import check_value_path, encode_value_path, value_path
from kernels import TokenWindow
from tests.support import tiny_artifact, tiny_backbone, tiny_vit

# One of every block and attention class, and of their options; see test_served.py.
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {},  # native registers, layer scale
    "vit_base_patch16_siglip_224": {},  # no prefix token
    "vit_base_patch16_clip_quickgelu_224": {},  # norm before the first block
    "vit_base_patch16_rpn_224": {},  # norms after attention and MLP
    "eva02_base_patch16_clip_224": {},  # separate projections, a norm before the output's
    "eva02_enormous_patch14_clip_224": {},  # norms after attention and MLP, fused with biases
    "vit_small_patch16_dinov3": {},  # fused projections without bias
    "vit_small_patch16_dinov3_qkvb": {},  # fused projections with q and v bias
    "vit_pe_spatial_tiny_patch16_512": {},  # rotary attention, no final norm
    "eva_clip_8b_patch14_448": {},  # separate projections without bias, RMS norm
    "eva_clip_18b_patch14_224": {},  # the same with norms after attention and MLP
    "internvit_6b_patch14_448": {},  # a norm of q and of k across heads, no final norm
    "rice_large_patch14_560": {},  # rotary attention of all tokens
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},  # two heads share their values
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny(name):
    vit = tiny_vit(name, img_size=56 if "patch14" in name else 64, **FAMILIES[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vit.parameters():  # nothing zero or one that would hide a mistake
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Backbone(vit, name=name)


def pixels(backbone, rows=4, columns=4):
    p = backbone.patch_size
    return torch.randn(2, 3, rows * p, columns * p, generator=torch.Generator().manual_seed(2))


def reference(backbone, images_B3HW, path):
    """timm's own last block, with a mask that lets every token see itself alone."""
    vit, last = backbone.vit, list(backbone.vit.blocks)[-1]
    found = vit.forward_intermediates(
        images_B3HW,
        indices=[backbone.depth - 2],
        norm=False,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    x = torch.cat([found[1], found[0]], dim=1) if isinstance(found, tuple) else found
    itself = torch.eye(x.shape[1], dtype=torch.bool)
    if path == "block":
        return vit.norm(last(x, attn_mask=itself))
    if type(last).__name__ in ("ResPostBlock", "EvaBlockPostNorm"):
        return vit.norm(last.norm1(last.attn(x, attn_mask=itself)))
    attended = last.attn(last.norm1(x), attn_mask=itself)
    if hasattr(last, "ls1"):
        return vit.norm(last.ls1(attended))
    return vit.norm(attended if last.gamma_1 is None else last.gamma_1 * attended)


@pytest.mark.parametrize("path", ["attention", "block"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_every_token_attends_to_itself_alone(name, path):
    backbone = tiny(name)
    images_B3HW = pixels(backbone)

    found = value_path(
        backbone.vit,
        images_B3HW,
        window=TokenWindow((4, 4), 0, backbone.num_prefix_tokens),
        path=path,
    )

    torch.testing.assert_close(found, reference(backbone, images_B3HW, path), **CLOSE)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva_clip_8b_patch14_448", "internvit_6b_patch14_448"]
)
@torch.inference_mode()
def test_the_border_is_seen_and_stripped(name):
    backbone = tiny(name)
    canvas_B3HW = pixels(backbone, rows=5, columns=6)  # an image of 3x4 patches, border 1

    found = value_path(
        backbone.vit, canvas_B3HW, window=TokenWindow((3, 4), 1, backbone.num_prefix_tokens)
    )

    prefix = backbone.num_prefix_tokens
    expected = reference(backbone, canvas_B3HW, "attention")
    torch.testing.assert_close(found[:, :prefix], expected[:, :prefix], **CLOSE)
    image, _ = strip(expected[:, prefix:], (3, 4), 1)
    torch.testing.assert_close(found[:, prefix:], image, **CLOSE)


@torch.inference_mode()
def test_no_value_path_is_the_block_behind_the_final_norm():
    backbone = tiny("vit_base_patch16_clip_quickgelu_224")
    images_B3HW = pixels(backbone)

    found = value_path(backbone.vit, images_B3HW, window=TokenWindow((4, 4), 0, 1), path="none")

    torch.testing.assert_close(found, backbone.vit.forward_features(images_B3HW), **CLOSE)


def test_an_artifact_is_encoded_with_its_border(tmp_path):
    encoder = open_model(tiny_artifact(tmp_path / "a", border=RegisterBorder(seed=7)), device="cpu")
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)

    found = encode_value_path(encoder, images)

    canvas = encoder.canvas(images, 1)
    assert canvas.shape[-2:] == (80, 96)
    with torch.inference_mode():
        image, _ = strip(reference(encoder.backbone, canvas, "attention")[:, 1:], (3, 4), 1)
    torch.testing.assert_close(found.tokens, image, **CLOSE)
    assert found.grid == (3, 4)
    without = encode_value_path(encoder, images, register_width=0)
    assert not torch.allclose(found.tokens, without.tokens, atol=1e-3)


@pytest.mark.parametrize("dense_norm", [True, False])
def test_plain_tokens_are_behind_the_norm_whatever_dense_features_are(dense_norm):
    backbone = tiny_backbone()
    encoder = DenseEncoder(backbone, digest="d", precision="fp32")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = backbone.vit.forward_features(encoder.canvas(images, 0))[:, 1:]
    backbone.dense_norm = dense_norm

    for is_served in (True, False):  # the project's forward, and timm's own
        if not is_served:
            backbone.vit.__class__ = type("Other", (type(backbone.vit),), {})
            encoder = DenseEncoder(backbone, digest="d", precision="fp32")
        found = encode_value_path(encoder, images, path="none")
        torch.testing.assert_close(found.tokens, expected, **CLOSE)


def test_models_without_a_known_value_path_are_refused():
    backbone = tiny_backbone(depth=1)
    with pytest.raises(ModelError, match="a value path needs two or more"):
        check_value_path(backbone.vit, backbone.name)

    other = tiny_backbone()
    other.vit.__class__ = type("Other", (type(other.vit),), {})
    encoder = DenseEncoder(other, digest="d", precision="fp32")
    with pytest.raises(ModelError, match="take the plain tokens"):
        encode_value_path(encoder, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
