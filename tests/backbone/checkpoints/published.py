"""Tiny checkpoints in published layouts, as transformers writes them, and their dense features."""

import contextlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from backbone import Backbone
from backbone.checkpoints import Layout, fill, find_plan, open_checkpoint
from backbone.checkpoints import layouts as known

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OURS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
P14 = {"image_size": 56, "patch_size": 14}
P16 = {"image_size": 64, "patch_size": 16}


@dataclass(frozen=True)
class Published:
    """A class of transformers, the timm model that its weights are for, and what they share."""

    layout: Layout
    timm: str
    model: str
    config: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    dense_norm: bool = True
    patch: int = 14
    prefix: int = 1  # tokens that stand before transformers' patches
    off_grid: str = "antialias"  # "exact", or "impossible" in transformers

    def write(self, folder: Path, seed: int = 0) -> nn.Module:
        """Save a model with random weights to `folder`, and return it."""
        torch.manual_seed(seed)
        cls = getattr(transformers, self.model)
        config = getattr(transformers, self.model.replace("Model", "Config"))(**self.config)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Nothing so small, or so alike, that mixing it up would not show.
                parameter.add_(0.1 * torch.randn_like(parameter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        return model

    def features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """transformers' patch tokens, [B, N, C]."""
        native = self.config["image_size"]
        side = native[0] if isinstance(native, list) else native
        off_grid = pixels.shape[-2:] != (side, side)
        takes_flag = self.model in ("SiglipVisionModel", "CLIPVisionModel")
        arguments = {"interpolate_pos_encoding": True} if off_grid and takes_flag else {}
        with torch.no_grad():
            output = model(pixels, **arguments).last_hidden_state
        return output[:, self.prefix :]

    def empty(self) -> nn.Module:
        """Our model on the meta device."""
        size = self.config["image_size"]
        side = size[0] if isinstance(size, list) else size
        arguments = {"num_classes": 0, "img_size": side, **OURS, **self.changes}
        with torch.device("meta"):
            return timm.create_model(self.timm, dynamic_img_size=True, **arguments).eval()

    def read(self, path: Path, dtype: torch.dtype = torch.float32) -> Backbone:
        """Our model with the weights of a file or folder."""
        vit, checkpoint = self.empty(), open_checkpoint(path)
        plan = find_plan(vit, checkpoint, model=self.timm)
        assert plan is not None
        fill(vit, checkpoint, plan, model=self.timm, dtype=dtype)
        return Backbone(vit, name=self.timm, dense_norm=self.dense_norm)


CASES = {
    "dinov2": Published(
        known.DINOV2, "vit_small_patch14_dinov2", "Dinov2Model", {**TINY, **P14, "mlp_ratio": 4}
    ),
    "dinov2-giant": Published(
        known.DINOV2_GIANT,
        "vit_giant_patch14_dinov2",
        "Dinov2Model",
        {**TINY, **P14, "mlp_ratio": 4, "use_swiglu_ffn": True},
        {"mlp_ratio": 5.5},
    ),
    "dinov2-registers": Published(
        known.DINOV2_REGISTERS,
        "vit_small_patch14_reg4_dinov2",
        "Dinov2WithRegistersModel",
        {**TINY, **P14, "mlp_ratio": 4},
        prefix=5,
        off_grid="exact",
    ),
    "dinov3": Published(
        known.DINOV3,
        "vit_small_patch16_dinov3_qkvb",
        "DINOv3ViTModel",
        {**TINY, **P16, "intermediate_size": 128, "num_register_tokens": 4},
        patch=16,
        prefix=5,
        off_grid="exact",
    ),
    "dinov3-gated": Published(
        known.DINOV3,
        "vit_small_plus_patch16_dinov3_qkvb",
        "DINOv3ViTModel",
        {
            **TINY,
            **P16,
            "intermediate_size": 128,
            "num_register_tokens": 4,
            "use_gated_mlp": True,
            "hidden_act": "silu",
        },
        patch=16,
        prefix=5,
        off_grid="exact",
    ),
    "siglip": Published(
        known.SIGLIP,
        "vit_so400m_patch16_siglip_512",
        "SiglipVisionModel",
        {**TINY, **P16, "intermediate_size": 64},
        {"mlp_ratio": 2},
        patch=16,
        prefix=0,
    ),
    "siglip-without-pooling": Published(
        known.SIGLIP,
        "vit_so400m_patch16_siglip_gap_512",
        "SiglipVisionModel",
        {**TINY, **P16, "intermediate_size": 64},
        {"mlp_ratio": 2},
        patch=16,
        prefix=0,
    ),
    "clip": Published(
        known.CLIP,
        "vit_base_patch16_clip_quickgelu_224",
        "CLIPVisionModel",
        {**TINY, **P16, "intermediate_size": 64},
        {"mlp_ratio": 2},
        dense_norm=False,
        patch=16,
    ),
    "internvl": Published(
        known.INTERNVL,
        "internvit_6b_patch14_448",
        "InternVLVisionModel",
        {
            **TINY,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "intermediate_size": 128,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
        dense_norm=False,
    ),
    "rice": Published(
        known.RICE,
        "rice_large_patch14_560",
        "MLCDVisionModel",
        {**TINY, **P14, "intermediate_size": 128},
        dense_norm=False,
        off_grid="exact",
    ),
    "aimv2": Published(
        known.AIMV2,
        "aimv2_large_patch14_224",
        "Aimv2VisionModel",
        {**TINY, **P14, "intermediate_size": 88, "use_head": True},
        prefix=0,
        off_grid="impossible",
    ),
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@contextlib.contextmanager
def without_antialiasing(monkeypatch: Any) -> Any:
    """Position embeddings resampled as transformers does it."""
    from timm.models import eva, vision_transformer

    for module in (eva, vision_transformer):
        resample = module.resample_abs_pos_embed
        monkeypatch.setattr(
            module,
            "resample_abs_pos_embed",
            lambda *args, resample=resample, **kwargs: resample(
                *args, **{**kwargs, "antialias": False}
            ),
        )
    yield
    monkeypatch.undo()
