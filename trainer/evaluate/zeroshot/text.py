"""Text towers: CLIP's and SigLIP's, run by transformers' own classes.

    tower = open_text_tower(find_tower("openai/clip-vit-base-patch16"))
    tower.embed(["a photo of a cat."])                   # unit vectors [texts, P]

Which family a checkpoint is of is said by its tensors, and not by its configuration: EVA-CLIP's
text tower is CLIP's, under a configuration that names code of its own, which is never run. The
names of the original releases (`text.*`, as of EVA-CLIP's .pt files and OpenCLIP) are turned into
transformers'.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.digest import weights_digest
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.sources import TowerFiles
from trainer.evaluate.zeroshot.tokens import Family, Tokenize, open_tokenizer

_BATCH = 64
_HEAD_WIDTH = 64  # channels of a head in every text tower of OpenAI, OpenCLIP and EVA-CLIP
# What tensors do not say.
_DECIDING = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")
_ORIGINAL_NAMES = (
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"token_embedding\.", "embeddings.token_embedding."),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_final\.", "final_layer_norm."),
)


@dataclass(frozen=True)
class TextTower:
    """A text tower with its tokenizer.

    Attributes:
        family: Which visual side belongs to it.
        dim: P, channels of an embedding.
        digest: SHA-256 of its weights.
        key: Hex; of the weights and of what the configuration decides beside them.
        scale: Cosines are multiplied by this before a softmax, as in training.
        tokenize: Texts to token numbers [texts, tokens].
    """

    family: Family
    dim: int
    digest: str
    key: str
    scale: float
    tokenize: Tokenize
    model: nn.Module

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, float32 `[texts, P]` on the CPU."""
        return self.embed_tokens(self.tokenize(texts))

    @torch.inference_mode()
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Unit vectors of token numbers `[texts, tokens]`."""
        name = "text_embeds" if self.family == "clip" else "pooler_output"
        parts = [getattr(self.model(input_ids=part), name) for part in torch.split(tokens, _BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=-1).clone()


def open_text_tower(files: TowerFiles) -> TextTower:
    """The text tower of a checkpoint.

    Raises:
        ZeroshotError: there is none, it is of an unknown kind or incomplete, or has no tokenizer.
        ModelError: the weights cannot be read.
    """
    tensors, config = _text_tensors(files)
    name = files.checkpoint.name
    family: Family = "siglip" if "text_model.head.weight" in tensors else "clip"
    scale = files.read(lambda key: key == "logit_scale").get("logit_scale")
    model = _filled(family, config, tensors, name)
    settings: Any = model.config
    tokenize = open_tokenizer(
        files.tokenizer,
        family,
        length=int(settings.max_position_embeddings),
        vocabulary=int(settings.vocab_size),
    )
    final = "text_model.head.weight" if family == "siglip" else "text_projection.weight"
    digest = weights_digest(tensors)
    decided = [str(getattr(settings, name)) for name in _DECIDING]
    return TextTower(
        family=family,
        dim=int(tensors[final].shape[0]),
        digest=digest,
        key=hashlib.sha256(json.dumps([digest, *decided]).encode()).hexdigest(),
        scale=float(scale.float().exp()) if scale is not None else 100.0,
        tokenize=tokenize,
        model=model,
    )


def _text_tensors(files: TowerFiles) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in transformers' names on disk, and the configuration of the tower they make."""
    keys, name = files.checkpoint.keys, files.checkpoint.name
    if any(key.startswith("text_model.") for key in keys):
        tensors = files.read(lambda key: key.startswith(("text_model.", "text_projection.")))
        tensors = {key: t for key, t in tensors.items() if not key.endswith("position_ids")}
        config = files.config.get("text_config") or files.config
        if not isinstance(config, dict) or not config:
            raise ZeroshotError(
                f"{name} is a text tower in transformers' layout without config.json, which says "
                "how many heads it has; give the folder with both"
            )
        final = {"text_model.head.weight", "text_projection.weight"}
        if final.isdisjoint(tensors):
            raise ZeroshotError(
                f"{name} has a text tower without its projection (text_projection.weight, or "
                "text_model.head.weight of SigLIP): its embeddings are in no space that images "
                "share; take the whole model, or CLIPTextModelWithProjection's"
            )
        return tensors, dict(config)
    prefix = "text." if "text.token_embedding.weight" in keys else ""
    if f"{prefix}token_embedding.weight" in keys and f"{prefix}text_projection" in keys:
        return _from_original(files, prefix)
    raise ZeroshotError(
        f"{name} has no text tower: no text_model.* or text.* of CLIP, EVA-CLIP or SigLIP. Image "
        "backbones without text, as DINOv2 and DINOv3, cannot be measured this way: use "
        "`python -m trainer.evaluate segmentation`, a linear probe"
    )


def _from_original(files: TowerFiles, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """From the names of the original releases.

    Their activation is GELU, as EVA's and LAION's, unless OpenCLIP's configuration says otherwise.
    """
    parts = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
    given = files.read(
        lambda key: (
            key.startswith(tuple(prefix + part for part in parts))
            or key == f"{prefix}text_projection"
        )
    )
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        plain = key.removeprefix(prefix)
        if plain == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif match := re.fullmatch(
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", plain
        ):
            stem = f"text_model.encoder.layers.{match[1]}.self_attn"
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{stem}.{letter}_proj.{match[2]}"] = part.contiguous()
        else:
            for pattern, replacement in _ORIGINAL_NAMES:
                plain = re.sub("^" + pattern, replacement, plain)
            found[f"text_model.{plain}"] = value
    embedding = found["text_model.embeddings.token_embedding.weight"]
    hidden = found.get("text_model.encoder.layers.0.mlp.fc1.weight")
    numbers = [re.match(r"text_model\.encoder\.layers\.(\d+)\.", key) for key in found]
    width = embedding.shape[1]
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": 4 * width if hidden is None else hidden.shape[0],
        "num_hidden_layers": 1 + max((int(each[1]) for each in numbers if each), default=-1),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": len(found["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": "quick_gelu" if files.is_quick_gelu else "gelu",
        "eos_token_id": 2,  # the text ends at its highest token number, as in the original code
    }
    return found, config


def _filled(
    family: Family, config: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> nn.Module:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        SiglipTextConfig,
        SiglipTextModel,
    )

    known = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    final = "text_model.head.weight" if family == "siglip" else "text_projection.weight"
    size = {"siglip": "projection_size", "clip": "projection_dim"}[family]
    known[size] = tensors[final].shape[0]
    kinds: dict[Family, tuple[Any, Any]] = {
        "clip": (CLIPTextConfig, CLIPTextModelWithProjection),
        "siglip": (SiglipTextConfig, SiglipTextModel),
    }
    make_config, make_model = kinds[family]
    try:
        with _quiet():
            model, report = make_model.from_pretrained(
                None,
                config=make_config.from_dict(known),
                state_dict={key: value.float() for key, value in tensors.items()},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ZeroshotError(f"the text tower of {name} cannot be built: {error}") from error
    for what in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if report[what]:
            first = sorted(map(str, report[what]))[0]
            raise ZeroshotError(
                f"the text tower of {name} does not fit its configuration: {len(report[what])} "
                f"{what.replace('_', ' ')}, the first {first}; it is incomplete, or of a kind that "
                "is not known here"
            )
    filled: nn.Module = model.eval().requires_grad_(False)
    return filled


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and remarks about configurations."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
