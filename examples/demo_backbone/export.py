"""Write a ViT as a folder that timm loads by itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer


def save_timm_folder(
    encoder: VisionTransformer, folder: Path, *, architecture: str, mean: float, std: float
) -> None:
    """Write `config.json` (timm's hub format) and `model.safetensors` (float16) into `folder`."""
    height, width = encoder.patch_embed.img_size
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": encoder.global_pool,
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [mean] * 3,
            "std": [std] * 3,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in encoder.state_dict().items()}
    assert all(torch.isfinite(value).all() for value in weights.values()), (
        "a weight overflows float16"
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
