"""The forward that is served: timm's numbers, computed with the project's attention.

`served_layers` gives what timm's `forward_intermediates` gives, with two differences. Every block
calls `kernels.attention`. And the last block that is needed computes nothing for tokens that nobody
asked for: the border's tokens are keys and values there, but no queries, and pass through neither
output projection nor MLP.

Evaluation only: dropout and stochastic depth are left out. Each block class of timm has its forward
written out here; `obstacle` says which models have another one and must use timm's own.

Dimension key: B = images, T = all tokens (prefix, then canvas), K = kept tokens (prefix, then the
image's), C = channels, H = heads, D = channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.architectures import JointNormAttention, RiceVit
from kernels import TokenWindow, attention

# Exact classes: a subclass may do something else in its forward. Of ours it is known what they do.
_MODELS = (VisionTransformer, Eva, RiceVit)
_ATTENTIONS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    Block: (Attention, JointNormAttention),
    ResPostBlock: (Attention,),
    EvaBlock: (EvaAttention, AttentionRope),
    EvaBlockPostNorm: (EvaAttention, AttentionRope),
}
_MLPS = (Mlp, GluMlp, SwiGLU)  # each token by itself, so that leaving some out changes no other


def obstacle(vit: nn.Module) -> str | None:
    """Why `served_layers` cannot run a model, or None when it can."""
    if type(vit) not in _MODELS:
        return f"a {type(vit).__name__}"
    assert isinstance(vit, VisionTransformer | Eva)
    for block in vit.blocks:
        if type(block) not in _ATTENTIONS:
            return f"blocks of the class {type(block).__name__}"
        if type(block.attn) not in _ATTENTIONS[type(block)]:
            return f"attention of the class {type(block.attn).__name__}"
        if type(block.mlp) not in _MLPS:
            return f"an MLP of the class {type(block.mlp).__name__}"
    return None


def served_layers(
    vit: VisionTransformer | Eva,
    pixels_B3HW: Tensor,
    *,
    layers: Sequence[int],
    window: TokenWindow,
    norm: bool,
) -> list[Tensor]:
    """Tokens of several blocks from one forward, those that `window` keeps.

    A pure function of the model and the pixels, for `torch.compile(fullgraph=True)` too.

    Args:
        vit: In evaluation mode, with `obstacle(vit) is None`.
        pixels_B3HW: Normalised images, the register border around them.
        layers: Block numbers from 0, ascending.
        window: Where the image lies in the token sequence. One without border keeps everything.
        norm: Apply the model's final norm.

    Returns:
        One `tokens_BKC` per layer: the prefix tokens, then the image's in raster order.
    """
    x_BTC, rope = _embed(vit, pixels_B3HW)
    window.check(x_BTC.shape[1])
    kept_K = window.kept_index(x_BTC.device) if window.border else None
    last = layers[-1]
    outputs: list[Tensor] = []
    for number, block in enumerate(list(vit.blocks)[: last + 1]):
        block_rope = rope[number] if rope is not None and vit.rope_mixed else rope
        is_last = number == last and kept_K is not None
        x_BTC = _block(block, x_BTC, block_rope, window if is_last else None, kept_K)
        if number in layers:
            x_BKC = x_BTC if is_last else _keep(x_BTC, kept_K)
            outputs.append(vit.norm(x_BKC) if norm else x_BKC)
    return outputs


def _embed(vit: VisionTransformer | Eva, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens as they enter the first block, and the rotary embedding if the model has one."""
    patches = vit.patch_embed(pixels_B3HW)
    if isinstance(vit, Eva):
        x_BTC, rope = vit._pos_embed(patches)
        return vit.norm_pre(x_BTC), rope
    return vit.norm_pre(vit._pos_embed(patches)), None


def _block(
    block: nn.Module,
    x_BTC: Tensor,
    rope: Tensor | None,
    window: TokenWindow | None,
    kept_K: Tensor | None,
) -> Tensor:
    """A block for all tokens, or with a `window` for the tokens `kept_K` alone."""
    residual_BKC = x_BTC if window is None else _keep(x_BTC, kept_K)
    if isinstance(block, Block):
        attended_BKC = block.ls1(_attend(block.attn, block.norm1(x_BTC), rope, window, kept_K))
        x_BKC: Tensor = residual_BKC + attended_BKC
        mlp_BKC: Tensor = block.ls2(block.mlp(block.norm2(x_BKC)))
        return x_BKC + mlp_BKC
    if isinstance(block, EvaBlock):
        attended_BKC = _attend(block.attn, block.norm1(x_BTC), rope, window, kept_K)
        x_BKC = residual_BKC + _scaled(attended_BKC, block.gamma_1)
        return x_BKC + _scaled(block.mlp(block.norm2(x_BKC)), block.gamma_2)
    assert isinstance(block, ResPostBlock | EvaBlockPostNorm)
    x_BKC = residual_BKC + block.norm1(_attend(block.attn, x_BTC, rope, window, kept_K))
    mlp_BKC = block.norm2(block.mlp(x_BKC))
    return x_BKC + mlp_BKC


def _attend(
    attn: Any,  # one of the classes of _ATTENTIONS
    x_BTC: Tensor,
    rope: Tensor | None,
    window: TokenWindow | None,
    kept_K: Tensor | None,
) -> Tensor:
    """An attention module for all tokens, or with a `window` for the tokens `kept_K` alone."""
    q_BHTD, k_BHTD, v_BHTD = _projections(attn, x_BTC)
    q_BHTD, k_BHTD = attn.q_norm(q_BHTD), attn.k_norm(k_BHTD)
    if rope is not None:
        q_BHTD = _rotated(attn, q_BHTD, rope).type_as(v_BHTD)
        k_BHTD = _rotated(attn, k_BHTD, rope).type_as(v_BHTD)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:  # several heads share their keys and values
        k_BHTD = k_BHTD.repeat_interleave(groups, dim=1)
        v_BHTD = v_BHTD.repeat_interleave(groups, dim=1)
    out_BKC = attn.norm(attention(q_BHTD, k_BHTD, v_BHTD, window=window).flatten(2))
    if getattr(attn, "gate", None) is not None:
        asked_BKC = x_BTC if window is None else _keep(x_BTC, kept_K)
        out_BKC = out_BKC * attn.gate(asked_BKC).sigmoid()
    projected: Tensor = attn.proj(out_BKC)
    return projected


def _projections(attn: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, H, T, D]; views of one tensor where the weights are."""
    if attn.qkv is None:
        q, k, v = (
            projection(x_BTC).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        return q, k, v
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x_BTC)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            qkv = attn.qkv(x_BTC) + bias
        else:
            qkv = F.linear(x_BTC, attn.qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotated(attn: Any, x_BHTD: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of all but the prefix tokens."""
    num_prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    prefix, patches = x_BHTD[:, :, :num_prefix], x_BHTD[:, :, num_prefix:]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


def _keep(x_BTC: Tensor, kept_K: Tensor | None) -> Tensor:
    return x_BTC if kept_K is None else x_BTC.index_select(1, kept_K)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x
