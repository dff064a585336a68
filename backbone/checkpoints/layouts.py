"""The published key layouts that are read, and written for tests of the way back.

timm itself converts the layouts of the original releases (Meta's DINOv2 and DINOv3, OpenAI's and
OpenCLIP's, Apple's, NVIDIA's); here is what it does not: transformers' layouts, as they are on
disk, and those of the models that it has no entry for.

Names on disk are not those of transformers' modules in memory, and are those of its earlier
versions; files written before it dropped the prefix `vision_model.` have it.
"""

import torch

from backbone.checkpoints.rules import (
    Layout,
    Rule,
    Tensors,
    fused,
    parted,
    reshaped,
    same,
    tensor,
)

OTHER_TOWERS = (
    r"text_model\.",
    r"text\.",
    r"text_projection",
    r"language_model\.",
    r"model\.language_model\.",
    r"lm_head\.",
    r"mlp1\.",
    r"(model\.)?multi_modal_projector\.",
    r"visual_projection\.",
    r"logit_(scale|bias)$",
    r"(.*\.)?position_ids$",
)
"""Keys of what stands beside a vision tower in published files."""

_QKV = ("q_proj", "k_proj", "v_proj")
_VISION_MODEL = ("", "vision_model.")

TIMM = Layout(name="timm", rules=(), skipped=(r"(head|fc)\.(weight|bias)$",))
"""timm's own names; the classifier is left out."""


def _clip_blocks(fuse: bool) -> tuple[Rule, ...]:
    """Blocks as transformers' CLIP names them, and SigLIP, EVA-CLIP and MLCD after it."""
    block, ours = "encoder.layers.{i}", "blocks.{i}"
    if fuse:
        projections = fused(f"{block}.self_attn", _QKV, f"{ours}.attn.qkv")
    else:
        projections = (
            rule
            for name in _QKV
            for rule in same(f"{block}.self_attn.{name}", f"{ours}.attn.{name}")
        )
    return (
        *projections,
        *same(f"{block}.self_attn.out_proj", f"{ours}.attn.proj"),
        *same(f"{block}.layer_norm1", f"{ours}.norm1"),
        *same(f"{block}.layer_norm2", f"{ours}.norm2"),
        *same(f"{block}.mlp.fc1", f"{ours}.mlp.fc1"),
        *same(f"{block}.mlp.fc2", f"{ours}.mlp.fc2"),
    )


def _clip_ends() -> tuple[Rule, ...]:
    return (
        reshaped("embeddings.class_embedding", "cls_token", dims=2),
        reshaped("embeddings.position_embedding.weight", "pos_embed", dims=1),
        *same("embeddings.patch_embedding", "patch_embed.proj"),
        *same("pre_layrnorm", "norm_pre"),
        *same("post_layernorm", "norm"),
    )


def _pooling_head() -> tuple[Rule, ...]:
    """SigLIP's attention pooling, which dense features do not use."""
    return (
        tensor("head.probe", "attn_pool.latent"),
        *(
            Rule(
                (f"head.attention.in_proj_{kind}",),
                (f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"),
                read=lambda t: [t[0][: len(t[0]) // 3], t[0][len(t[0]) // 3 :]],
                write=lambda t: [torch.cat(t)],
            )
            for kind in ("weight", "bias")
        ),
        *same("head.attention.out_proj", "attn_pool.proj"),
        *same("head.layernorm", "attn_pool.norm"),
        *same("head.mlp.fc1", "attn_pool.mlp.fc1"),
        *same("head.mlp.fc2", "attn_pool.mlp.fc2"),
    )


CLIP = Layout(
    name="transformers CLIP",
    rules=(*_clip_ends(), *_clip_blocks(fuse=True)),
    prefixes=_VISION_MODEL,
    skipped=OTHER_TOWERS,
)

SIGLIP = Layout(
    name="transformers SigLIP",
    rules=(*_clip_ends(), *_clip_blocks(fuse=True), *_pooling_head()),
    prefixes=_VISION_MODEL,
    skipped=(*OTHER_TOWERS, r"head\."),
)

EVA_CLIP = Layout(
    name="transformers EVA-CLIP",
    rules=(*_clip_ends(), *_clip_blocks(fuse=False)),
    prefixes=_VISION_MODEL,
    skipped=OTHER_TOWERS,
)

EVA_ORIGINAL = Layout(
    name="EVA-CLIP's own",
    rules=(
        tensor("cls_token", "cls_token"),
        tensor("pos_embed", "pos_embed"),
        *same("patch_embed.proj", "patch_embed.proj"),
        *parted("blocks.{i}.attn.qkv", "blocks.{i}.attn", _QKV),
        *same("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        *same("blocks.{i}.norm1", "blocks.{i}.norm1"),
        *same("blocks.{i}.norm2", "blocks.{i}.norm2"),
        *same("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *same("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *same("norm", "norm"),
    ),
    prefixes=("visual.", ""),
    skipped=(*OTHER_TOWERS, r"head\."),
)

RICE = Layout(
    name="transformers MLCD (RICE)",
    rules=(
        tensor("class_pos_emb", "class_pos_emb"),
        *_clip_ends(),
        *_clip_blocks(fuse=False),
    ),
    prefixes=_VISION_MODEL,
    skipped=OTHER_TOWERS,
)

INTERNVIT = Layout(
    name="OpenGVLab's InternViT",
    rules=(
        tensor("embeddings.class_embedding", "cls_token"),
        tensor("embeddings.position_embedding", "pos_embed"),
        *same("embeddings.patch_embedding", "patch_embed.proj"),
        *same("encoder.layers.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
        *same("encoder.layers.{i}.attn.q_norm", "blocks.{i}.attn.q_norm", "weight"),
        *same("encoder.layers.{i}.attn.k_norm", "blocks.{i}.attn.k_norm", "weight"),
        *same("encoder.layers.{i}.attn.proj", "blocks.{i}.attn.proj"),
        *same("encoder.layers.{i}.norm1", "blocks.{i}.norm1"),
        *same("encoder.layers.{i}.norm2", "blocks.{i}.norm2"),
        tensor("encoder.layers.{i}.ls1", "blocks.{i}.ls1.gamma"),
        tensor("encoder.layers.{i}.ls2", "blocks.{i}.ls2.gamma"),
        *same("encoder.layers.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *same("encoder.layers.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ),
    prefixes=_VISION_MODEL,
    skipped=OTHER_TOWERS,
)

INTERNVL = Layout(
    name="transformers InternVL",
    rules=(
        tensor("embeddings.cls_token", "cls_token"),
        tensor("embeddings.position_embeddings", "pos_embed"),
        *same("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *fused("encoder.layer.{i}.attention", _QKV, "blocks.{i}.attn.qkv"),
        *same("encoder.layer.{i}.attention.q_norm", "blocks.{i}.attn.q_norm", "weight"),
        *same("encoder.layer.{i}.attention.k_norm", "blocks.{i}.attn.k_norm", "weight"),
        *same("encoder.layer.{i}.attention.projection_layer", "blocks.{i}.attn.proj"),
        *same("encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
        *same("encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
        tensor("encoder.layer.{i}.lambda_1", "blocks.{i}.ls1.gamma"),
        tensor("encoder.layer.{i}.lambda_2", "blocks.{i}.ls2.gamma"),
        *same("encoder.layer.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *same("encoder.layer.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ),
    prefixes=("", "vision_tower.", "model.vision_tower."),
    skipped=(*OTHER_TOWERS, r"embeddings\.mask_token$"),
)


def _dinov2(name: str, first: str, second: str, *, registers: bool) -> Layout:
    block = "encoder.layer.{i}"
    if registers:
        # timm adds the class token's position to the token itself.
        def read(tensors: Tensors) -> Tensors:
            token, positions = tensors
            return [token + positions[:, :1], positions[:, 1:]]

        def write(tensors: Tensors) -> Tensors:
            token, positions = tensors
            return [token, torch.cat([torch.zeros_like(token), positions], dim=1)]

        names = ("embeddings.cls_token", "embeddings.position_embeddings")
        ends = [
            Rule(names, ("cls_token", "pos_embed"), read, write),
            tensor("embeddings.register_tokens", "reg_token"),
        ]
    else:
        ends = [
            tensor("embeddings.cls_token", "cls_token"),
            tensor("embeddings.position_embeddings", "pos_embed"),
        ]
    return Layout(
        name=name,
        rules=(
            *ends,
            *same("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            *fused(
                f"{block}.attention.attention", ("query", "key", "value"), "blocks.{i}.attn.qkv"
            ),
            *same(f"{block}.attention.output.dense", "blocks.{i}.attn.proj"),
            *same(f"{block}.norm1", "blocks.{i}.norm1"),
            *same(f"{block}.norm2", "blocks.{i}.norm2"),
            tensor(f"{block}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
            tensor(f"{block}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
            *same(f"{block}.mlp.{first}", "blocks.{i}.mlp.fc1"),
            *same(f"{block}.mlp.{second}", "blocks.{i}.mlp.fc2"),
            *same("layernorm", "norm"),
        ),
        prefixes=("", "dinov2.", "dinov2_with_registers."),
        skipped=(r"embeddings\.mask_token$", r"classifier\."),
    )


DINOV2 = _dinov2("transformers DINOv2", "fc1", "fc2", registers=False)
DINOV2_GIANT = _dinov2(
    "transformers DINOv2 with SwiGLU", "weights_in", "weights_out", registers=False
)
DINOV2_REGISTERS = _dinov2("transformers DINOv2 with registers", "fc1", "fc2", registers=True)
DINOV2_REGISTERS_GIANT = _dinov2(
    "transformers DINOv2 with registers and SwiGLU", "weights_in", "weights_out", registers=True
)

DINOV3 = Layout(
    name="transformers DINOv3",
    rules=(
        tensor("embeddings.cls_token", "cls_token"),
        tensor("embeddings.register_tokens", "reg_token"),
        *same("embeddings.patch_embeddings", "patch_embed.proj"),
        Rule(
            tuple(f"layer.{{i}}.attention.{name}.weight" for name in _QKV),
            ("blocks.{i}.attn.qkv.weight",),
            read=lambda t: [torch.cat(t)],
            write=lambda t: list(t[0].chunk(3)),
        ),
        tensor("layer.{i}.attention.q_proj.bias", "blocks.{i}.attn.q_bias"),
        tensor("layer.{i}.attention.v_proj.bias", "blocks.{i}.attn.v_bias"),
        *same("layer.{i}.attention.o_proj", "blocks.{i}.attn.proj"),
        *same("layer.{i}.norm1", "blocks.{i}.norm1"),
        *same("layer.{i}.norm2", "blocks.{i}.norm2"),
        tensor("layer.{i}.layer_scale1.lambda1", "blocks.{i}.gamma_1"),
        tensor("layer.{i}.layer_scale2.lambda1", "blocks.{i}.gamma_2"),
        *same("layer.{i}.mlp.up_proj", "blocks.{i}.mlp.fc1"),
        *same("layer.{i}.mlp.up_proj", "blocks.{i}.mlp.fc1_x"),
        *same("layer.{i}.mlp.gate_proj", "blocks.{i}.mlp.fc1_g"),
        *same("layer.{i}.mlp.down_proj", "blocks.{i}.mlp.fc2"),
        *same("norm", "norm"),
    ),
    prefixes=("", "model."),
    skipped=(r"embeddings\.mask_token$",),
    # Of the distilled models they are zero, and timm's names without qkvb have no place for them.
    zero=(r"layer\.\d+\.attention\.[qv]_proj\.bias$",),
)

AIMV2 = Layout(
    name="transformers AIMv2",
    rules=(
        *same("embeddings.patch_embed", "patch_embed.proj"),
        *same("embeddings.rms_norm", "patch_embed.norm", "weight"),
        reshaped("embeddings.position_embedding.weight", "pos_embed", dims=1),
        *fused("encoder.layers.{i}.attention", _QKV, "blocks.{i}.attn.qkv"),
        *same("encoder.layers.{i}.attention.out_proj", "blocks.{i}.attn.proj"),
        *same("encoder.layers.{i}.rms_norm1", "blocks.{i}.norm1", "weight"),
        *same("encoder.layers.{i}.rms_norm2", "blocks.{i}.norm2", "weight"),
        *same("encoder.layers.{i}.ffn.gate_proj", "blocks.{i}.mlp.fc1_g"),
        *same("encoder.layers.{i}.ffn.up_proj", "blocks.{i}.mlp.fc1_x"),
        *same("encoder.layers.{i}.ffn.down_proj", "blocks.{i}.mlp.fc2"),
        *same("rms_norm", "norm", "weight"),
    ),
    prefixes=_VISION_MODEL,
    skipped=(*OTHER_TOWERS, r"head\."),
)

LAYOUTS = (
    TIMM,
    CLIP,
    SIGLIP,
    EVA_CLIP,
    EVA_ORIGINAL,
    RICE,
    INTERNVIT,
    INTERNVL,
    DINOV2,
    DINOV2_GIANT,
    DINOV2_REGISTERS,
    DINOV2_REGISTERS_GIANT,
    DINOV3,
    AIMV2,
)
