"""From dense tokens to the space that images and texts share: what a refined backbone lacks.

A projection, or SigLIP's attention pooling. The projection of CLIP and EVA-CLIP is linear, behind
the final norm, which is the backbone's own. SigLIP pools by attention with one learned query; its
dense embeddings are that pooling's value path, as MaskCLIP (arXiv:2112.01071, section 3.2) takes
the attention pooling of CLIP's ResNets: every token attends to itself alone, so its value goes
through the output projection, and then through the pooling's MLP with its norm and residual.

Dimension key: B = images, N = tokens, C = channels of a token, P = channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone import Backbone
from backbone.digest import weights_digest
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.sources import TowerFiles
from trainer.evaluate.zeroshot.tokens import Family

_SIGLIP_EPS = 1e-6
# Where the linear projection is, by publication; True: stored [C, P].
_LINEAR = {
    "visual_projection.weight": False,  # transformers: CLIP, EVA-CLIP
    "visual.head.weight": False,  # EVA-CLIP's own
    "visual.proj": True,  # OpenAI, OpenCLIP
    "visual.head.proj.weight": False,  # OpenCLIP around a timm tower
    "visual.trunk.head.weight": False,
    "head.weight": False,  # timm's CLIP and EVA-CLIP towers
}
_PATCHES = (
    "vision_model.embeddings.patch_embedding.weight",
    "visual.patch_embed.proj.weight",
    "visual.conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "embeddings.patch_embedding.weight",
    "patch_embed.proj.weight",
)
_KINDS = ("weight", "bias")
_TRANSFORMERS = {
    "out": "attention.out_proj",
    "norm": "layernorm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_TIMM = {"out": "proj", "norm": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
# Published weights may be in half precision, or have been refined in bfloat16.
_SAME_WEIGHTS = 0.02


class VisualHead(Protocol):
    """Dense tokens behind the final norm, `[B, N, C]`, to embeddings `[B, N, P]`."""

    @property
    def channels(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def __call__(self, tokens_BNC: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Projection:
    """A linear layer, weight `[P, C]`."""

    weight: Tensor
    bias: Tensor | None

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    @property
    def dim(self) -> int:
        return self.weight.shape[0]

    @property
    def digest(self) -> str:
        bias = {} if self.bias is None else {"bias": self.bias}
        return weights_digest({"weight": self.weight, **bias})

    def __call__(self, tokens_BNC: Tensor) -> Tensor:
        place = tokens_BNC.device
        bias = None if self.bias is None else self.bias.to(place)
        return F.linear(tokens_BNC, self.weight.to(place), bias)


@dataclass(frozen=True)
class PoolingValuePath:
    """SigLIP's pooling head with every token attending to itself; value, out, norm, fc1, fc2."""

    tensors: Mapping[str, Tensor]

    @property
    def channels(self) -> int:
        return self.tensors["value.weight"].shape[1]

    @property
    def dim(self) -> int:
        return self.tensors["fc2.weight"].shape[0]

    @property
    def digest(self) -> str:
        return weights_digest(self.tensors)

    def __call__(self, tokens_BNC: Tensor) -> Tensor:
        place = tokens_BNC.device

        def parts(name: str) -> tuple[Tensor, Tensor]:
            weight, bias = (self.tensors[f"{name}.{kind}"] for kind in ("weight", "bias"))
            return weight.to(place), bias.to(place)

        pooled = F.linear(F.linear(tokens_BNC, *parts("value")), *parts("out"))
        normed = F.layer_norm(pooled, pooled.shape[-1:], *parts("norm"), _SIGLIP_EPS)
        hidden = F.gelu(F.linear(normed, *parts("fc1")), approximate="tanh")
        return pooled + F.linear(hidden, *parts("fc2"))


def read_head(files: TowerFiles, family: Family) -> VisualHead:
    """The visual side's projection of a checkpoint.

    Raises:
        ZeroshotError: it has none.
        ModelError: it cannot be read.
    """
    head = _pooling(files) if family == "siglip" else _linear(files)
    if head is None:
        wanted = (
            "an attention pooling head (vision_model.head.* of transformers, attn_pool.* of timm)"
            if family == "siglip"
            else "a visual projection (visual_projection.weight, visual.head.weight, visual.proj)"
        )
        raise ZeroshotError(
            f"{files.checkpoint.name} has not {wanted}; name a checkpoint that has it, of the same "
            "model, with --projection"
        )
    return head


def check_pair(
    backbone: Backbone,
    head: VisualHead,
    files: TowerFiles,
    *,
    family: Family,
    text_dim: int,
    are_unrelated: bool = False,
) -> None:
    """Refuse a text tower and a backbone whose embeddings have nothing to do with each other.

    Refining changes no patch embedding, so that it says whose tower a checkpoint is of.

    Args:
        backbone: Raw or refined.
        head: Its projection.
        files: What the projection is from.
        family: Of the text tower.
        text_dim: Channels of its embeddings.
        are_unrelated: Compare all the same, as a trial: sizes alone must fit.

    Raises:
        ZeroshotError: families, sizes or weights differ.
    """
    name, source = backbone.name, files.checkpoint.name
    own = _family_of(name)
    known = _has_patches_of(backbone, files)
    if own is not None and own != family:
        raise ZeroshotError(
            f"{name} is of the {own} family and the text tower of the {family} family: their "
            "embeddings are in different spaces; give the text tower of the same model"
        )
    if own is None and known is not True and not are_unrelated:
        raise ZeroshotError(
            f"{name} was not trained with a text tower as far as is known here, and {source} does "
            "not hold its weights; measure it with `python -m trainer.evaluate segmentation`, or "
            "choose a CLIP, EVA-CLIP or SigLIP backbone"
        )
    if head.channels != backbone.embed_dim:
        raise ZeroshotError(
            f"{name} has {backbone.embed_dim} channels and the visual projection of {source} takes "
            f"{head.channels}: they are of different models"
        )
    if head.dim != text_dim:
        raise ZeroshotError(
            f"the visual projection of {source} gives {head.dim} channels and the text tower "
            f"{text_dim}: they are of different models"
        )
    if known is False and not are_unrelated:
        raise ZeroshotError(
            f"the patch embedding of {name} is not that of the vision tower in {source}, so its "
            "text tower was trained with other weights; give the checkpoint that the backbone was "
            "refined from, or compare them all the same with --unrelated-towers"
        )


def _family_of(name: str) -> Family | None:
    plain = name.lower()
    if "siglip" in plain:
        return "siglip"
    return "clip" if "clip" in plain else None


def _has_patches_of(backbone: Backbone, files: TowerFiles) -> bool | None:
    """Whether a checkpoint's vision tower is this one; None where it has none."""
    key = next((key for key in _PATCHES if key in files.checkpoint.keys), None)
    if key is None:
        return None
    theirs = files.read(lambda each: each == key)[key].float()
    ours = backbone.vit.patch_embed.proj.weight.detach().float().cpu()
    if ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).norm() <= _SAME_WEIGHTS * theirs.norm())


def _linear(files: TowerFiles) -> Projection | None:
    key = next((key for key in _LINEAR if key in files.checkpoint.keys), None)
    if key is None:
        return None
    bias = key.removesuffix("weight") + "bias"
    found = files.read(lambda each: each in (key, bias))
    weight = found[key].float()
    return Projection(
        weight=(weight.T if _LINEAR[key] else weight).contiguous(),
        bias=found[bias].float() if bias in found and bias != key else None,
    )


def _pooling(files: TowerFiles) -> PoolingValuePath | None:
    published = (
        ("vision_model.head.", "attention.in_proj_{kind}", 3, _TRANSFORMERS),
        ("head.", "attention.in_proj_{kind}", 3, _TRANSFORMERS),
        ("attn_pool.", "kv.{kind}", 2, _TIMM),
        ("visual.trunk.attn_pool.", "kv.{kind}", 2, _TIMM),
    )
    for prefix, joined, parts, places in published:
        name = prefix + joined
        if name.format(kind="weight") not in files.checkpoint.keys:
            continue
        found = files.read(partial(_starts_with, prefix))
        tensors = _last_part(found, name, parts) | {
            f"{ours}.{kind}": found.get(f"{prefix}{theirs}.{kind}")
            for ours, theirs in places.items()
            for kind in _KINDS
        }
        return _checked(files, tensors)
    return None


def _starts_with(prefix: str, key: str) -> bool:
    return key.startswith(prefix)


def _last_part(found: Mapping[str, Tensor], name: str, parts: int) -> dict[str, Tensor | None]:
    """The values' weight and bias: the last of the projections that are stored as one."""
    joined = {kind: found.get(name.format(kind=kind)) for kind in _KINDS}
    return {
        f"value.{kind}": None if tensor is None else tensor.chunk(parts)[-1].contiguous()
        for kind, tensor in joined.items()
    }


def _checked(files: TowerFiles, tensors: Mapping[str, Tensor | None]) -> PoolingValuePath:
    absent = [name for name, tensor in tensors.items() if tensor is None]
    if absent:
        raise ZeroshotError(
            f"the attention pooling head of {files.checkpoint.name} lacks {', '.join(absent)}; "
            "download the checkpoint again"
        )
    return PoolingValuePath({name: t.float() for name, t in tensors.items() if t is not None})


@torch.inference_mode()
def embed_tokens(head: VisualHead, tokens_BNC: Tensor) -> Tensor:
    """Unit embeddings of tokens behind the final norm, float32 `[B, N, P]`."""
    return F.normalize(head(tokens_BNC.float()), dim=-1)
