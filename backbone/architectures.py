"""Vision transformers that timm has the parts of, but no entry for.

Each constructor is registered with timm, under its own name: importing this module is enough for
`timm.create_model("eva_clip_8b_patch14_448", num_classes=0)`, and for a saved folder of such a
model to open with `timm.create_model("local-dir:PATH")`.

    eva_clip_8b_patch14_448, eva_clip_18b_patch14_224   BAAI's EVA-CLIP, the vision tower
    internvit_6b_patch14_224, internvit_6b_patch14_448  OpenGVLab's InternViT-6B
    rice_large_patch14_560                              DeepGlint's RICE-ViT

Dimension key: B = images, H = heads, T = all tokens, D = channels of a head, h, w = token grid.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Statistics(NamedTuple):
    """Mean and standard deviation per channel that pixels in [0, 1] are normalised with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class JointRmsNorm(RmsNorm):
    """RMS norm of queries or keys over the channels of all heads together, [B, H, T, D] in and out.

    timm's `qk_norm` norms every head by itself; InternViT-6B has one norm, and one vector of
    weights, across its 25 heads.
    """

    def forward(self, x: Tensor) -> Tensor:
        by_token = x.transpose(1, 2)
        normed: Tensor = super().forward(by_token.flatten(2))
        return normed.reshape(by_token.shape).transpose(1, 2)


class JointNormAttention(Attention):
    """timm's attention with `JointRmsNorm` for queries and keys; its forward is timm's."""

    def __init__(self, dim: int, num_heads: int = 8, **settings: Any) -> None:
        norm_layer: partial[RmsNorm] = settings["norm_layer"]
        super().__init__(dim, num_heads, **settings)
        if settings.get("qk_norm"):
            place: dict[str, Any] = {name: settings.get(name) for name in ("device", "dtype")}
            eps = norm_layer.keywords["eps"]
            self.q_norm = JointRmsNorm(self.attn_dim, eps=eps, **place)
            self.k_norm = JointRmsNorm(self.attn_dim, eps=eps, **place)


class RiceVit(Eva):
    """An Eva whose class token is rotated too, by a phase that was learned.

    Patches are rotated by their row and column numbers, not scaled to any reference grid.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        head_dim = self.embed_dim // settings["num_heads"]
        place = {name: settings.get(name) for name in ("device", "dtype")}
        self.class_pos_emb = nn.Parameter(torch.zeros(1, head_dim // 2, **place))
        nn.init.normal_(self.class_pos_emb)
        for module in self.blocks.modules():
            if isinstance(module, AttentionRope):
                module.num_prefix_tokens = 0  # the rotary table has a row for the class token

    def rotary_table(self, grid: tuple[int, int]) -> Tensor:
        """Sines, then cosines of all tokens of a grid (h, w): [1 + h * w, 2 * D], float32."""
        assert isinstance(self.rope, RotaryEmbeddingCat)
        patches = self.rope.get_embed(shape=list(grid)).float()
        phase = self.class_pos_emb.float().to(patches.device)
        class_row = torch.cat([phase.sin(), phase.sin(), phase.cos(), phase.cos()], dim=-1)
        return torch.cat([class_row, patches])

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim == 4:
            grid = (int(x.shape[1]), int(x.shape[2]))
        else:
            grid = tuple(self.patch_embed.grid_size)
        tokens, _ = super()._pos_embed(x)
        return tokens, self.rotary_table(grid)


def _default_cfg(size: int, statistics: Statistics) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "num_classes": 0,
        **statistics._asdict(),
    }


# No weights are named here: they are in other layouts than timm's, see `backbone.checkpoints`.
default_cfgs = generate_default_cfgs(
    {
        "eva_clip_8b_patch14_448": _default_cfg(448, CLIP),
        "eva_clip_18b_patch14_224": _default_cfg(224, CLIP),
        "internvit_6b_patch14_224": _default_cfg(224, IMAGENET),
        "internvit_6b_patch14_448": _default_cfg(448, IMAGENET),
        "rice_large_patch14_560": _default_cfg(560, CLIP),
    }
)


def _build(family: type[nn.Module], name: str, settings: dict[str, Any]) -> Any:
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(family, name, feature_cfg=feature_cfg, **(arguments | settings))


def _eva_clip(name: str, settings: dict[str, Any]) -> Eva:
    """EVA-CLIP from 8B on: RMS norms, an MLP of five times the width, no q, k, v biases.

    q, k and v are separate linear layers, so that each gets an adapter of its own.
    """
    defaults = {
        "patch_size": 14,
        "mlp_ratio": 5,
        "qkv_bias": False,
        "qkv_fused": False,
        "norm_layer": partial(RmsNorm, eps=1e-6),
    }
    return _build(Eva, name, defaults | settings)  # type: ignore[no-any-return]


@register_model
def eva_clip_8b_patch14_448(pretrained: bool = False, **settings: Any) -> Eva:
    size = {"img_size": 448, "embed_dim": 4096, "depth": 32, "num_heads": 32}
    return _eva_clip("eva_clip_8b_patch14_448", {"pretrained": pretrained, **size, **settings})


@register_model
def eva_clip_18b_patch14_224(pretrained: bool = False, **settings: Any) -> Eva:
    """Norms after attention and MLP, unlike the 8B model."""
    size = {"img_size": 224, "embed_dim": 5120, "depth": 48, "num_heads": 40}
    given = {"pretrained": pretrained, **size, "use_post_norm": True, **settings}
    return _eva_clip("eva_clip_18b_patch14_224", given)


def _internvit_6b(name: str, settings: dict[str, Any]) -> VisionTransformer:
    defaults = {
        "patch_size": 14,
        "embed_dim": 3200,
        "num_heads": 25,
        "mlp_ratio": 4,
        "qkv_bias": False,
        "qk_norm": True,
        "attn_layer": JointNormAttention,
        "init_values": 0.1,
        "norm_layer": partial(RmsNorm, eps=1e-6),
        "final_norm": False,
    }
    return _build(VisionTransformer, name, defaults | settings)  # type: ignore[no-any-return]


@register_model
def internvit_6b_patch14_224(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """The checkpoint has 48 blocks; pass `depth=45` to leave the last three out."""
    size = {"img_size": 224, "depth": 48}
    return _internvit_6b("internvit_6b_patch14_224", {"pretrained": pretrained, **size, **settings})


@register_model
def internvit_6b_patch14_448(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    size = {"img_size": 448, "depth": 45}
    return _internvit_6b("internvit_6b_patch14_448", {"pretrained": pretrained, **size, **settings})


@register_model
def rice_large_patch14_560(pretrained: bool = False, **settings: Any) -> RiceVit:
    """`attn_type` rope, because only that attention of timm has a bias for k as well."""
    defaults = {
        "img_size": 560,
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "qkv_fused": False,
        "attn_type": "rope",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "cat",
        "rope_temperature": 1e4,
        "rope_rotate_half": True,
        "rope_grid_indexing": "ij",
        "use_pre_transformer_norm": True,
        "norm_layer": partial(LayerNorm, eps=1e-5),
    }
    given = {"pretrained": pretrained, **defaults, **settings}
    return _build(RiceVit, "rice_large_patch14_560", given)  # type: ignore[no-any-return]
