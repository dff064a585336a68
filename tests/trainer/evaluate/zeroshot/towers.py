"""Tiny image and text towers in the published formats, with a tokenizer of single letters."""

import json
import string
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)
from transformers.utils import logging

from backbone import Backbone
from tests.backbone.checkpoints.eva_clip_reference import EvaClipReference
from tests.backbone.checkpoints.published import CASES, P16, TINY, Published

DIM = 8  # channels of an embedding
LENGTH = 48
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
# The end has the highest number, as in the published vocabulary.
CLIP_VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>"]
SIGLIP_VOCABULARY = ["<pad>", "</s>", "<unk>", *LETTERS]
TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}


def clip_numbers():
    return {token: n for n, token in enumerate([*CLIP_VOCABULARY, "<|endoftext|>"])}


def clip_text_config(**changes):
    numbers = clip_numbers()
    special = {"bos_token_id": len(numbers) - 2, "eos_token_id": len(numbers) - 1}
    return {**TEXT, **special, "vocab_size": len(numbers), "pad_token_id": 0, **changes}


def lively(model, seed=0):
    """Random weights, none so small, or so alike, that mixing it up would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model, folder):
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    if before:
        logging.enable_progress_bar()


def write_clip_tokenizer(folder: Path) -> None:
    CLIPTokenizer(vocab=clip_numbers(), merges=[]).save_pretrained(folder)


def write_siglip_tokenizer(folder: Path) -> None:
    vocabulary = {token: n for n, token in enumerate(SIGLIP_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def write_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """A CLIP model as OpenAI's and LAION's are on the hub."""
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=clip_text_config(hidden_act="quick_gelu", projection_dim=DIM),
        vision_config={**TINY, **P16, "intermediate_size": 64},
        projection_dim=DIM,
    )
    model = lively(CLIPModel(config), seed)
    save(model, folder)
    write_clip_tokenizer(folder)
    return model


def write_siglip(folder: Path, seed: int = 0) -> SiglipModel:
    torch.manual_seed(seed)
    text = {**TEXT, "vocab_size": len(SIGLIP_VOCABULARY), "projection_size": TINY["hidden_size"]}
    vision = {**TINY, **P16, "intermediate_size": 64}
    model = lively(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed)
    save(model, folder)
    write_siglip_tokenizer(folder)
    return model


def write_eva_clip(folder: Path, seed: int = 0) -> tuple[EvaClipReference, torch.nn.Module]:
    """EVA-CLIP-8B's layout on the hub: a configuration that names code, vision and text."""
    torch.manual_seed(seed)
    vision = EvaClipReference()
    settings = clip_text_config(hidden_act="gelu", projection_dim=DIM)
    text = lively(CLIPTextModelWithProjection(CLIPTextConfig(**settings)), seed)
    save(text, folder)
    tensors = {
        key: value
        for key, value in vision.state_dict().items()
        if key.startswith(("vision_model.", "visual_projection."))
    }
    tensors |= load_file(folder / "model.safetensors")
    tensors["logit_scale"] = torch.tensor(3.0)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "clip",
        "architectures": ["EvaCLIPModel"],
        "auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPModel"},
        "projection_dim": DIM,
        "text_config": {**settings, "q_bias": True, "model_type": "clip_text_model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evaclip.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    return vision, text


def in_original_names(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP text tower of transformers in the names of EVA-CLIP's .pt files and OpenCLIP."""
    found = {}
    for key, value in text.items():
        name = key.replace("text_model.encoder.layers.", "text.transformer.resblocks.")
        name = name.replace("self_attn.out_proj", "attn.out_proj")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        name = name.replace("text_model.final_layer_norm", "text.ln_final")
        name = name.replace("layer_norm", "ln_")
        name = name.replace("text_model.embeddings.token_embedding", "text.token_embedding")
        if key == "text_projection.weight":
            found["text.text_projection"] = value.T.contiguous()
        elif key == "text_model.embeddings.position_embedding.weight":
            found["text.positional_embedding"] = value
        elif key.startswith("text_model.") and "self_attn" not in name:
            found[name] = value
    for layer in range(TEXT["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            stem = f"text_model.encoder.layers.{layer}.self_attn"
            parts = [text[f"{stem}.{letter}_proj.{kind}"] for letter in "qkv"]
            place = f"text.transformer.resblocks.{layer}.attn.in_proj_{kind}"
            found[place] = torch.cat(parts)
    return found


def clip_backbone(folder: Path) -> Backbone:
    return CASES["clip"].read(folder)


def siglip_backbone(folder: Path) -> Backbone:
    return CASES["siglip"].read(folder)


def eva_backbone(path: Path) -> Backbone:
    from backbone.checkpoints import layouts

    config = {"image_size": 56}
    case = Published(layouts.EVA_CLIP, "eva_clip_8b_patch14_448", "", config, dense_norm=False)
    return case.read(path)
