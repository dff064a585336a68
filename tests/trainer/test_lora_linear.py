"""The adapted layer: PEFT's numbers, with little kept for the backward pass."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.support import tiny_backbone
from trainer.config import LoraSection
from trainer.lora import Adapter, linear_names
from trainer.lora_linear import LoraLinear, _kept

# GELU; LayerScale and native registers; SwiGLU, rotary embedding and separate biases.
MODELS = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "eva02_tiny_patch14_224": 56,
}


def adapted(backbone, **section):
    adapter = Adapter.attach(backbone, LoraSection(**section), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def tokens_and_gradients(backbone, pixels, **autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
        tokens = backbone.encode(pixels).tokens
    backbone.zero_grad()
    tokens.float().sin().sum().backward()
    gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return tokens.detach(), gradients


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_peft(name, bf16):
    ours = tiny_backbone(name, img_size=MODELS[name])
    theirs = copy.deepcopy(ours)
    adapted(ours, dropout=0, alpha=4)
    names = linear_names(theirs.vit)
    theirs.requires_grad_(False)
    get_peft_model(theirs.vit, LoraConfig(r=8, lora_alpha=4, target_modules=names))
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, *ours.native_size)

    tokens, gradients = tokens_and_gradients(ours, pixels, enabled=bf16)
    expected, expected_gradients = tokens_and_gradients(theirs, pixels, enabled=bf16)

    assert all(type(m) is LoraLinear for m in ours.modules() if hasattr(m, "lora_A"))
    assert len(gradients) == 2 * len(names)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
    torch.testing.assert_close(tokens, expected, **tolerance)
    for key, gradient in gradients.items():
        difference = (gradient - expected_gradients[key]).norm() / expected_gradients[key].norm()
        assert difference < (5e-2 if bf16 else 1e-5), key


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_leaves_out_its_share_the_same_in_both_passes(share):
    backbone = tiny_backbone()
    adapted(backbone, dropout=share).train_dropout(True)
    layer = backbone.vit.blocks[0].mlp.fc1
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(4, 500, 32, dtype=torch.float64, requires_grad=True)
    layer.double()

    torch.manual_seed(3)
    out = layer(x)
    out.sum().backward()
    torch.manual_seed(3)
    kept = _kept(x, share, int(torch.randint(2**62, ())))

    base = layer.get_base_layer()
    level = round(share * 65536) / 65536
    again = x.detach().requires_grad_()
    dropped = again * kept / (1 - level)
    expected = base(again) + layer.scaling["default"] * (dropped @ down.mT @ up.mT)
    expected_gradients = torch.autograd.grad(expected.sum(), (again, down, up))
    assert kept.double().mean() == pytest.approx(1 - share, abs=0.01)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close((x.grad, down.grad, up.grad), expected_gradients)


def test_without_training_there_is_no_dropout_and_nothing_is_drawn():
    backbone = tiny_backbone()
    adapted(backbone, dropout=0.5).train_dropout(False)
    torch.manual_seed(0)
    expected = torch.rand(2)

    torch.manual_seed(0)
    backbone.encode(torch.randn(1, 3, 64, 64, generator=torch.Generator()))

    assert torch.equal(torch.rand(2), expected)


def saved_bytes(function):
    """Bytes that autograd keeps after `function`, every memory once, weights left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    del result
    return sum(sizes)


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 10.6), (0.1, 12.4)])
def test_a_block_keeps_less_than_half_of_what_it_would_by_peft(dropout, most):
    backbone = tiny_backbone(embed_dim=128, num_heads=2, drop_rate=0.0)
    adapted(backbone, dropout=dropout, rank=1).train_dropout(True)
    block = backbone.vit.blocks[1]
    x = torch.randn(4, 64, 128, requires_grad=True)

    in_tokens = saved_bytes(lambda: block(x)) / (x.numel() * 4)

    # Input of the first norm, q, k, v, attention's output, input of the second norm, and of GELU
    # four times as wide: 10. Dropout's bytes: 7/4. And what is of rank 1. By PEFT's layers: 24.
    assert 10 <= in_tokens < most


def test_hooks_are_gone_when_the_adapter_is_merged():
    backbone = tiny_backbone()
    adapter = adapted(backbone)

    adapter.merge()

    assert not any(module._forward_hooks for module in backbone.vit.modules())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_norm_is_made_again_under_the_same_autocast(bf16):
    seen = []

    class Watched(nn.LayerNorm):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(x)

    backbone = tiny_backbone()
    block = backbone.vit.blocks[0]
    block.norm1 = Watched(block.norm1.normalized_shape).requires_grad_(False)
    adapted(backbone, dropout=0)

    tokens_and_gradients(backbone, torch.randn(1, 3, 64, 64), enabled=bf16)

    assert seen == [(bf16, torch.bfloat16)] * 2
