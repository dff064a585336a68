import logging
import shutil

import pytest
import torch
from torch import nn

from backbone import Backbone, RegisterBorder, open_model
from backbone.encoder import DenseEncoder
from backbone.served import obstacle, served_layers
from kernels import TokenWindow
from tests.support import tiny_artifact, tiny_backbone, tiny_vit

# One of every block and attention class that has a served forward, and of their options.
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {},  # native registers, layer scale
    "vit_giant_patch14_reg4_dinov2": {},  # packed SwiGLU
    "vit_base_patch16_siglip_224": {},  # no prefix token
    "vit_base_patch16_clip_224": {},  # norm before the first block
    "aimv2_large_patch14_224": {},  # RMS norm, SwiGLU
    "vit_base_patch16_rpn_224": {},  # norms after attention and MLP
    "eva02_base_patch16_clip_224": {},  # separate projections, rotary, norms inside both
    "eva02_enormous_patch14_clip_224": {},  # norms after attention and MLP
    "vit_small_patch16_dinov3": {},  # rotary by halves, fused projections without bias
    "vit_small_patch16_dinov3_qkvb": {},  # fused projections with q and v bias
    "vit_pe_spatial_tiny_patch16_512": {},  # rotary attention, no final norm
    "vit_base_patch16_rope_mixed_224": {},  # a rotary embedding for every block
    "eva_clip_8b_patch14_448": {},  # separate projections without bias, RMS norm
    "eva_clip_18b_patch14_224": {},  # the same with norms after attention and MLP
    "internvit_6b_patch14_448": {},  # a norm of q and of k across heads, no final norm
    "rice_large_patch14_560": {},  # rotary attention of all tokens, separate projections
    "vit_base_patch16_sapiens2": {
        "num_kv_heads": 1
    },  # two heads share their keys, q and k have a norm
}
# Measured: 4e-8 of the largest value. The same operations, but a kernel may add in other order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def lively_vit(name="vit_tiny_patch16_224", **changes):
    """A tiny model none of whose parameters is so small that leaving it out would not show."""
    vit = tiny_vit(name, **({"depth": 3} | changes))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def encoder_of(vit, name="tiny"):
    encoder = DenseEncoder(Backbone(vit, name=name), digest="", precision="fp32")
    encoder.border = RegisterBorder(seed=3)
    return encoder


def images(batch, height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("layers", [(-1,), (0, 2), (1,)])
@pytest.mark.parametrize("border", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_served_features_are_those_of_timms_forward(name, border, layers):
    backbone = Backbone(lively_vit(name, **FAMILIES[name]), name=name)
    grid, p = (3, 5), backbone.patch_size
    canvas = torch.randn(2, 3, (3 + 2 * border) * p, (5 + 2 * border) * p)
    window = TokenWindow(grid, border, backbone.num_prefix_tokens)

    with torch.no_grad():
        whole = backbone.encode_layers(canvas, layers)
        served = served_layers(
            backbone.vit,
            canvas,
            layers=[backbone.layer_number(layer) for layer in layers],
            window=window,
            norm=True,
        )

    for expected, tokens in zip(whole, served, strict=True):
        everything = torch.cat([expected.prefix, expected.tokens], dim=1)
        torch.testing.assert_close(tokens, everything[:, window.kept_index()], **CLOSE)


def test_a_gated_attention_is_served():
    vit = lively_vit()
    for block in vit.blocks:
        block.attn.gate = nn.Linear(32, 32)
    encoder = encoder_of(vit)

    (features,) = encoder.encode(images(1, 48, 80))
    encoder._is_served = False
    (expected,) = encoder.encode(images(1, 48, 80))

    torch.testing.assert_close(features.tokens, expected.tokens, **CLOSE)


def test_the_last_block_does_no_work_for_the_border():
    encoder = encoder_of(lively_vit())
    seen = {}
    for number, block in enumerate(encoder.backbone.vit.blocks):
        block.mlp.register_forward_pre_hook(
            lambda _module, args, number=number: seen.update({number: args[0].shape[1]})
        )

    encoder.encode(images(1, 64, 64))
    assert seen == {0: 37, 1: 37, 2: 17}

    seen.clear()
    encoder.encode(images(1, 64, 64), layers=(1, 0))
    assert seen == {0: 37, 1: 17}

    encoder.encode(images(1, 64, 64), registers=True)
    assert seen == {0: 37, 1: 37, 2: 37}


def test_registers_come_when_they_are_asked_for():
    encoder = encoder_of(lively_vit())
    batch = images(2, 48, 80)

    (without,) = encoder.encode(batch)
    (with_registers,) = encoder.encode(batch, registers=True)
    encoder._is_served = False
    (timms,) = encoder.encode(batch, registers=True)

    assert without.registers is None
    assert encoder.encode(batch)[0].registers is None  # whichever forward runs
    torch.testing.assert_close(with_registers.tokens, without.tokens, **CLOSE)
    torch.testing.assert_close(with_registers.registers, timms.registers, **CLOSE)
    torch.testing.assert_close(with_registers.prefix, timms.prefix, **CLOSE)


def test_taps_see_the_served_forward():
    encoder = encoder_of(lively_vit("vit_small_patch16_dinov3"))

    with encoder.backbone.tap_attention([-1]) as taps:
        encoder.encode(images(1, 48, 80))

    q, k = taps[2]
    assert q.shape == k.shape == (1, 2, 5 * 7 + 5, 16)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_xp_224", "blocks of the class ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "attention of the class DiffAttention"),
        ("deit_tiny_distilled_patch16_224", "a VisionTransformerDistilled"),
    ],
)
def test_a_model_of_another_class_keeps_timms_forward_and_says_so(name, reason, caplog):
    changes = {"depth": 3, "num_heads": 4} if "dwee" in name else {"depth": 3}
    backbone = tiny_backbone(name, **changes)
    with caplog.at_level(logging.WARNING):
        encoder = DenseEncoder(backbone, digest="", precision="fp32")

    (features,) = encoder.encode(images(1, 64, 64))

    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert features.tokens.shape == (1, 16, 32)


def test_a_subclass_may_do_anything_and_is_not_served():
    class Noisy(nn.Identity):
        pass

    vit = tiny_vit()
    assert obstacle(vit) is None

    vit.blocks[1].mlp = Noisy()

    assert obstacle(vit) == "an MLP of the class Noisy"


class Served(nn.Module):
    """The part of a served forward that is compiled: normalised canvas in, tokens out."""

    def __init__(self, vit, window, layers=(0, 2)):
        super().__init__()
        self.vit, self.window, self.layers = vit, window, list(layers)

    def forward(self, canvas):
        return served_layers(self.vit, canvas, layers=self.layers, window=self.window, norm=True)


def compiled_agrees(name, backend):
    vit = lively_vit(name, **FAMILIES[name])
    model = Served(vit, TokenWindow((2, 3), 1, vit.num_prefix_tokens))
    p = vit.patch_embed.patch_size[0]
    canvas = torch.randn(2, 3, 4 * p, 5 * p)
    torch._dynamo.reset()

    with torch.inference_mode():
        eager = model(canvas)
        compiled = torch.compile(model, fullgraph=True, backend=backend)(canvas)

    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, one, **CLOSE)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch14_reg4_dinov2",
        "eva02_base_patch16_clip_224",
        "internvit_6b_patch14_448",
        "rice_large_patch14_560",
    ],
)
def test_the_served_forward_compiles_without_a_graph_break(name):
    compiled_agrees(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: inductor not tested")
@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_inductors_code_agrees(name):
    compiled_agrees(name, "inductor")


def test_an_artifact_is_served_as_before(tmp_path):
    encoder = open_model(tiny_artifact(tmp_path / "a"), precision="fp32")
    batch = images(2, 64, 96)

    (features,) = encoder.encode(batch)
    encoder._is_served = False
    (expected,) = encoder.encode(batch)

    torch.testing.assert_close(features.tokens, expected.tokens, **CLOSE)
    torch.testing.assert_close(features.prefix, expected.prefix, **CLOSE)
    assert features.grid == expected.grid == (4, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_the_kernels_serve_timms_features(name, dtype):
    backbone = Backbone(lively_vit(name), name=name).cuda()
    p, window = backbone.patch_size, TokenWindow((3, 5), 2, backbone.num_prefix_tokens)
    canvas = torch.randn(2, 3, 7 * p, 9 * p, device="cuda")

    with torch.inference_mode():
        (whole,) = backbone.encode_layers(canvas, [-1])
        backbone.to(dtype)
        (rounded,) = backbone.encode_layers(canvas.to(dtype), [-1])
        model = Served(backbone.vit, window, [2])
        (served,) = model(canvas.to(dtype))

    image = window.image_index(canvas.device) - window.prefix
    expected = whole.tokens[:, image]

    def error(tokens):
        return float((tokens.float() - expected).norm() / expected.norm())

    # At most twice as far from float32 as timm's forward in the same precision.
    assert error(served[:, window.prefix :]) <= 2 * error(rounded.tokens[:, image]) + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")
def test_a_cuda_graph_replays_the_served_forward():
    vit = lively_vit().cuda().bfloat16()
    model = Served(vit, TokenWindow((4, 4), 1, 1))
    canvas = torch.randn(2, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            model(canvas)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = model(canvas)
        canvas.copy_(torch.randn_like(canvas))
        graph.replay()

        for one, other in zip(model(canvas), replayed, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2)
