"""What the costs of a vision transformer depend on, read off a model without its weights.

    architecture = architecture_of("siglip2-so400m")     # catalogue entry, timm name, model folder
    architecture.forward_flops(architecture.num_tokens(32, 32))

FLOPs are those of matrix products, two per multiply-add.

Dimension key: C = channels of a token, M = hidden channels of the MLP, T = tokens of an image with
border or strip and prefix tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from backbone import Backbone
from backbone.catalog import find
from backbone.errors import ModelError
from backbone.loading import build_timm_model

# A norm's input is in float32 under autocast: a 16-bit number more for each of its own.
_NORM_COPIES = 1


@dataclass(frozen=True)
class Architecture:
    """What the costs of a vision transformer depend on.

    Attributes:
        depth: Blocks.
        width: Channels of a token, C.
        hidden: Hidden channels of the MLP, M; of one branch where it is gated.
        patch: Side of a patch in pixels.
        prefix: Class and native register tokens.
        native_size: Side in pixels of the model's own images.
        parameters: In all.
        gated: The MLP has a gate.
        packed_gate: Gate and value come from one layer.
        split_qkv: q, k and v come from three layers.
        rotary: q and k are rotated.
        normed_qk: q and k are normed.
        inner_norms: There are norms before the last layers of attention and MLP too.
    """

    depth: int
    width: int
    hidden: int
    patch: int
    prefix: int
    native_size: int
    parameters: int
    gated: bool = False
    packed_gate: bool = False
    split_qkv: bool = False
    rotary: bool = False
    normed_qk: bool = False
    inner_norms: bool = False

    def num_tokens(self, rows: int, columns: int) -> int:
        """Tokens of a grid, prefix tokens included."""
        return rows * columns + self.prefix

    def forward_flops(self, num_tokens: int) -> float:
        """Of one image through the blocks and the patch embedding."""
        C, M = self.width, self.hidden
        weights = 4 * C * C + (3 if self.gated else 2) * C * M
        block = 2 * num_tokens * weights + 4 * num_tokens**2 * C
        return self.depth * block + 2 * num_tokens * 3 * self.patch**2 * C

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on every linear layer of the blocks."""
        C, M = self.width, self.hidden
        attention = (6 * C if self.split_qkv else 4 * C) + 2 * C
        if self.gated:
            mlp = (C + 2 * M if self.packed_gate else 2 * (C + M)) + M + C
        else:
            mlp = 2 * (C + M)
        return self.depth * rank * (attention + mlp)

    def block_numbers(self) -> int:
        """16-bit numbers per token that a block with adapter keeps for its backward pass.

        Frozen weights need no inputs, and `trainer.lora_linear` makes what a norm or an activation
        gave again: what is left are inputs of norms and activations, and attention's own tensors.
        """
        C, M = self.width, self.hidden
        normed = 2 * C + (2 * C if self.normed_qk else 0) + (C + M if self.inner_norms else 0)
        attention = 4 * C  # q, k, v, output
        if self.normed_qk or (self.rotary and not self.split_qkv):
            attention += 2 * C  # q and k as projected, beside what they became
        if self.rotary:
            attention += C  # the output in the order of its last layer's input
        # Gate, its activation, value, and their product.
        mlp = 4 * M if self.gated else M
        return 2 * C + attention + mlp + _NORM_COPIES * normed

    def transient_numbers(self) -> int:
        """16-bit numbers per token that a block without gradient holds at its peak."""
        C, M = self.width, self.hidden
        return max(2 * C + (4 if self.gated else 2) * M, 8 * C)


def architecture_of(name: str) -> Architecture:
    """The architecture of a catalogue entry, timm name or model folder; no weights are read.

    Raises:
        ModelNotFoundError, ModelError: there is no such model, or it cannot be built.
    """
    entry = find(name)
    with torch.device("meta"):
        if entry is None:
            vit, _ = build_timm_model(name, random_weights=True)
            backbone = Backbone(vit, name=name)
            return inspect_model(backbone.vit, native_size=backbone.native_size[0])
        # Blocks are alike: one is enough, and forty take a second to build.
        vit = entry.build(depth=1)
        return inspect_model(vit, depth=entry.depth, native_size=entry.native_size)


def inspect_model(
    vit: nn.Module, *, depth: int | None = None, native_size: int | None = None
) -> Architecture:
    """Read an architecture off a timm model.

    Args:
        vit: Of the VisionTransformer or Eva family.
        depth: Blocks, where the model was built with fewer.
        native_size: Side of its images in pixels, where the model does not say it.

    Raises:
        ModelError: its blocks are not of attention and MLP.
    """
    model: Any = vit
    block = model.blocks[0]
    if not (hasattr(block, "attn") and hasattr(getattr(block, "mlp", None), "fc2")):
        raise ModelError(
            f"blocks of the class {type(block).__name__} are not known here, so that nothing can "
            "be computed; the trainer itself may take the model"
        )
    attention, mlp = block.attn, block.mlp
    num_built = len(model.blocks)
    depth = depth or num_built
    block_parameters = sum(p.numel() for p in block.parameters())
    gate = getattr(mlp, "fc1_g", None)
    hidden = mlp.fc2.in_features
    packed = gate is None and mlp.fc1.out_features == 2 * hidden
    return Architecture(
        depth=depth,
        width=model.embed_dim,
        hidden=hidden,
        patch=model.patch_embed.patch_size[0],
        prefix=model.num_prefix_tokens,
        native_size=native_size or model.patch_embed.img_size[0],
        parameters=sum(p.numel() for p in vit.parameters())
        + (depth - num_built) * block_parameters,
        gated=gate is not None or packed,
        packed_gate=packed,
        split_qkv=getattr(attention, "qkv", None) is None,
        rotary=getattr(model, "rope", None) is not None,
        normed_qk=_does_something(attention, "q_norm"),
        inner_norms=_does_something(mlp, "norm"),
    )


def _does_something(module: nn.Module, name: str) -> bool:
    return not isinstance(getattr(module, name, None), nn.Identity | None)
