import pytest
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from backbone import Backbone
from backbone.architectures import JointNormAttention
from backbone.errors import ModelError
from tests.support import tiny_backbone, tiny_vit
from tests.trainer.refining import one_step, random_images, small_recipe, small_refiner
from trainer.config import LoraSection
from trainer.errors import AdapterError
from trainer.lora import Adapter, linear_names

# One model of each attention class, and what its projections are.
ATTENTION = {
    "vit_tiny_patch16_224": (Attention, "fused"),
    "vit_small_patch16_dinov3": (EvaAttention, "fused, no bias"),
    "vit_small_patch16_dinov3_qkvb": (EvaAttention, "fused, q and v bias"),
    "eva02_base_patch16_clip_224": (EvaAttention, "separate"),
    "vit_pe_spatial_tiny_patch16_512": (AttentionRope, "fused"),
    "eva_clip_18b_patch14_224": (EvaAttention, "separate"),
    "internvit_6b_patch14_448": (JointNormAttention, "fused"),
    "rice_large_patch14_560": (AttentionRope, "separate"),
}


def projections(attention):
    if attention.qkv is None:
        return "separate"
    if not isinstance(attention, EvaAttention):
        return "fused"
    return "fused, no bias" if attention.q_bias is None else "fused, q and v bias"


@pytest.mark.parametrize("name", ATTENTION)
def test_every_lora_b_gets_a_gradient_from_a_step(name):
    backbone = tiny_backbone(name, patch_size=16)
    attention = backbone.vit.blocks[0].attn
    assert (type(attention), projections(attention)) == ATTENTION[name]

    refiner = small_refiner(small_recipe(), backbone=backbone, trained=False)
    _, _, gradients = one_step(refiner, random_images())

    names = [n for n in gradients if "lora_B" in n]
    assert len(names) == len(linear_names(tiny_vit(name)))
    dead = [n for n in names if gradients[n] is None or not gradients[n].abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("name", ATTENTION)
def test_every_linear_layer_of_the_blocks_and_nothing_else_is_adapted(name):
    backbone = tiny_backbone(name)
    linear = {
        n
        for n, m in backbone.vit.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("blocks.")
    }

    Adapter.attach(backbone, LoraSection(), seed=0)

    trained = {n for n, p in backbone.vit.named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0] for n in trained} == linear
    assert len(trained) == 2 * len(linear)


def test_patch_embedding_and_attention_pool_are_left_alone():
    backbone = tiny_backbone("vit_base_patch16_siglip_224", depth=1)
    assert backbone.vit.attn_pool is not None

    Adapter.attach(backbone, LoraSection(), seed=0)

    adapted = [n for n, _ in backbone.vit.named_modules() if "lora_A" in n]
    assert adapted
    assert all(name.startswith("blocks.0.") for name in adapted)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_teacher_is_the_untouched_model(name):
    untouched, pixels = tiny_backbone(name, patch_size=16), torch.randn(2, 3, 64, 64)
    refiner = small_refiner(backbone=tiny_backbone(name, patch_size=16)).train()

    with torch.no_grad(), refiner._adapter.off():
        teacher = refiner.backbone.encode(pixels).tokens
    student = refiner.backbone.encode(pixels).tokens

    assert torch.equal(teacher, untouched.encode(pixels).tokens)
    assert not torch.allclose(student, teacher)


def test_an_attached_adapter_changes_nothing_before_training():
    pixels = torch.randn(1, 3, 64, 64)
    backbone = tiny_backbone()
    before = backbone.encode(pixels).tokens

    Adapter.attach(backbone, LoraSection(), seed=0)

    assert torch.equal(backbone.encode(pixels).tokens, before)


def test_the_seed_decides_the_adapter_and_the_global_generator_is_left_alone():
    def first_layer(seed):
        backbone = tiny_backbone()
        torch.manual_seed(5)
        Adapter.attach(backbone, LoraSection(), seed=seed)
        after = torch.rand(1)
        return backbone.vit.blocks[0].attn.qkv.lora_A["default"].weight, after

    (one, after_one), (same, _), (other, after_other) = map(first_layer, (0, 0, 1))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(after_one, after_other)


def test_rank_alpha_and_dropout_arrive():
    backbone = tiny_backbone()

    Adapter.attach(backbone, LoraSection(rank=3, alpha=12, dropout=0.25), seed=0)

    layer = backbone.vit.blocks[1].mlp.fc1
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 4.0
    assert layer.lora_dropout["default"].p == 0.25


def test_a_merged_backbone_gives_the_students_tokens_and_has_no_adapter_left():
    pixels = torch.randn(2, 3, 64, 64)
    refiner = small_refiner().eval()
    student = refiner.backbone.encode(pixels).tokens

    refiner._adapter.merge()

    assert not any("lora" in name for name in refiner.backbone.vit.state_dict())
    torch.testing.assert_close(refiner.backbone.encode(pixels).tokens, student)


def test_a_saved_adapter_loads_with_peft(tmp_path):
    from peft import PeftModel

    pixels = torch.randn(1, 3, 64, 64)
    refiner = small_refiner().eval()
    student = refiner.backbone.encode(pixels).tokens

    refiner._adapter.save(tmp_path / "adapter")

    vit = tiny_vit()
    PeftModel.from_pretrained(vit, str(tmp_path / "adapter"))
    torch.testing.assert_close(Backbone(vit, name="tiny").encode(pixels).tokens, student)


def test_a_backbone_without_linear_layers_is_refused():
    backbone = tiny_backbone()
    backbone.vit.blocks = nn.Sequential(nn.Identity())

    with pytest.raises(ModelError, match="no linear layers"):
        Adapter.attach(backbone, LoraSection(), seed=0)


def test_an_adapter_without_its_config_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    refiner = small_refiner()
    refiner._adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: pytest.fail("asked"))

    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        Adapter.load(tiny_backbone(), tmp_path / "adapter")
