"""Dense features of the value path: the last block's values instead of its attention.

A tower that was trained on image and text pairs aligns one pooled token with the text. In its last
block that token is a weighted mean of values, so values go through the output projection into the
space that the text knows, while the patch tokens of the whole block need not. With attention
replaced by the identity every token gets its own value there:

    attention   proj(v(norm1(x)))                     no residual, no MLP: ClearCLIP's choice
    block       x + proj(v(norm1(x))), then its MLP   as MaskCLIP's released ViT has it
    none        the block as it is: plain dense features

The final norm follows in each. The block before the last is the last one that mixes tokens, and
what `backbone.served` computes up to there is what is served.

Dimension key: B = images, T = all tokens, K = kept tokens (prefix, then the image's), C = channels,
h, w = pixels of the image, H, W = of the canvas around it.

Source: MaskCLIP, arXiv:2112.01071, section 3.2 (values and output projection); ClearCLIP,
arXiv:2407.12442 (without residual and MLP); SCLIP, arXiv:2312.01597, and MaskCLIP's code keep both.
"""

from typing import Any, Literal

import torch
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from backbone.encoder import DenseEncoder
from backbone.errors import ModelError
from backbone.served import obstacle, served_layers
from backbone.vit import DenseFeatures
from kernels import TokenWindow, sdpa_in_order

ValuePath = Literal["attention", "block", "none"]


def check_value_path(vit: nn.Module, name: str) -> None:
    """
    Raises:
        ModelError: the model has blocks whose values are not known here, or too few of them.
    """
    reason = obstacle(vit)
    if reason is not None:
        raise ModelError(
            f"{name} has {reason}: its value path is not known; take the plain tokens of its last "
            "block instead (path none)"
        )
    assert isinstance(vit, VisionTransformer | Eva)
    if len(vit.blocks) < 2:
        raise ModelError(f"{name} has {len(vit.blocks)} block; a value path needs two or more")


def value_path(
    vit: VisionTransformer | Eva,
    pixels_B3HW: Tensor,
    *,
    window: TokenWindow,
    path: ValuePath = "attention",
) -> Tensor:
    """Tokens of the last block with attention replaced by the identity, after the final norm.

    Args:
        vit: In evaluation mode; one that `check_value_path` accepts, unless the path is `none`.
        pixels_B3HW: Normalised images, the register border around them.
        window: Where the image lies in the token sequence; the border is left out of what is
            returned, not of what the blocks see.
        path: See above.

    Returns:
        `tokens_BKC`: the prefix tokens, then the image's in raster order.
    """
    depth = len(vit.blocks)
    if path == "none":
        return served_layers(vit, pixels_B3HW, layers=[depth - 1], window=window, norm=True)[0]
    before = served_layers(vit, pixels_B3HW, layers=[depth - 2], window=window, norm=False)[0]
    x_BKC = _value_block(list(vit.blocks)[-1], before, keeps_block=path == "block")
    normed: Tensor = vit.norm(x_BKC)
    return normed


@torch.inference_mode()
def encode_value_path(
    encoder: DenseEncoder,
    images_B3hw: Tensor,
    *,
    path: ValuePath = "attention",
    register_width: int | None = None,
) -> DenseFeatures:
    """Value-path features of uint8 images, as `DenseEncoder.encode` gives plain ones.

    A refined backbone sees its register border, which is stripped again. Unlike `encode` the final
    norm is always applied, whatever the backbone's `dense_norm`: text is aligned behind it.

    Raises:
        ImageSizeError: sizes that the patch grid or the border cannot have.
        ModelError: see `check_value_path`.
    """
    backbone = encoder.backbone
    height, image_width = images_B3hw.shape[-2:]
    grid = backbone.grid(height, image_width)
    width = encoder.register_width(height, image_width, register_width)
    num_prefix = backbone.num_prefix_tokens
    if path == "none" and obstacle(backbone.vit) is not None:
        features = encoder.encode(images_B3hw, register_width=register_width)[0]
        if backbone.dense_norm:
            return features
        normed: Tensor = backbone.vit.norm(features.tokens)
        return DenseFeatures(normed, grid, encoder.patch_size, features.prefix)
    if path != "none":
        check_value_path(backbone.vit, backbone.name)
    canvas_B3HW = encoder.canvas(images_B3hw, width)
    with sdpa_in_order(canvas_B3HW.device):
        tokens_BKC = value_path(
            backbone.vit, canvas_B3HW, window=TokenWindow(grid, width, num_prefix), path=path
        )
    return DenseFeatures(
        tokens_BKC[:, num_prefix:], grid, encoder.patch_size, tokens_BKC[:, :num_prefix]
    )


def _value_block(block: nn.Module, x_BKC: Tensor, *, keeps_block: bool) -> Tensor:
    """The block of each token by itself; without residual and MLP unless `keeps_block`."""
    if isinstance(block, Block):
        own_BKC: Tensor = block.ls1(_own_value(block.attn, block.norm1(x_BKC)))
        if not keeps_block:
            return own_BKC
        x_BKC = x_BKC + own_BKC
        mlp_BKC: Tensor = block.ls2(block.mlp(block.norm2(x_BKC)))
        return x_BKC + mlp_BKC
    if isinstance(block, EvaBlock):
        own_BKC = _scaled(_own_value(block.attn, block.norm1(x_BKC)), block.gamma_1)
        if not keeps_block:
            return own_BKC
        x_BKC = x_BKC + own_BKC
        return x_BKC + _scaled(block.mlp(block.norm2(x_BKC)), block.gamma_2)
    assert isinstance(block, ResPostBlock | EvaBlockPostNorm)
    own_BKC = block.norm1(_own_value(block.attn, x_BKC))
    if not keeps_block:
        return own_BKC
    x_BKC = x_BKC + own_BKC
    mlp_BKC = block.norm2(block.mlp(x_BKC))
    return x_BKC + mlp_BKC


def _own_value(attn: Any, x_BKC: Tensor) -> Tensor:
    """An attention module of timm with every token attending to itself alone."""
    if attn.qkv is None:
        value_BKC = attn.v_proj(x_BKC)
    else:
        value_BKC = attn.qkv(x_BKC).chunk(3, dim=-1)[-1]  # the module: it may carry an adapter
        if getattr(attn, "v_bias", None) is not None:
            value_BKC = value_BKC + attn.v_bias
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:  # several heads share their values
        heads = value_BKC.unflatten(-1, (-1, attn.head_dim))
        value_BKC = heads.repeat_interleave(groups, dim=-2).flatten(-2)
    value_BKC = attn.norm(value_BKC)
    if getattr(attn, "gate", None) is not None:
        value_BKC = value_BKC * attn.gate(x_BKC).sigmoid()
    projected: Tensor = attn.proj(value_BKC)
    return projected


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x
