"""EVA-CLIP's vision tower, written from what its authors published, with their tensors' names.

Tokens are patches by a convolution, a class token before them, a learned position added to each.
Blocks: RMS norms before attention and MLP (8B), or after them (18B); queries, keys and values
without bias; an MLP of GELU. No norm before the blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, *, post_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.post_norm = num_heads, post_norm
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(dim, dim, bias=False))
        self.self_attn.out_proj = nn.Linear(dim, dim)
        self.layer_norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.layer_norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (
            getattr(self.self_attn, name)(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.self_attn.out_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.layer_norm1(self._attend(x))
            return x + self.layer_norm2(self._mlp(x))
        x = x + self._attend(self.layer_norm1(x))
        return x + self._mlp(self.layer_norm2(x))


class EvaClipReference(nn.Module):
    """`forward` gives all tokens after the last block, before the final norm."""

    def __init__(self, *, post_norm: bool = False, dim: int = 32, depth: int = 2, grid: int = 4):
        super().__init__()
        tower = self.vision_model = nn.Module()
        tower.embeddings = nn.Module()
        tower.embeddings.class_embedding = nn.Parameter(torch.randn(dim))
        tower.embeddings.patch_embedding = nn.Conv2d(3, dim, 14, 14)
        tower.embeddings.position_embedding = nn.Embedding(grid * grid + 1, dim)
        tower.encoder = nn.Module()
        tower.encoder.layers = nn.ModuleList(
            [Layer(dim, 2, 5 * dim, post_norm=post_norm) for _ in range(depth)]
        )
        tower.post_layernorm = nn.RMSNorm(dim, eps=1e-6)
        self.visual_projection = nn.Linear(dim, 8, bias=False)
        self.text_projection = nn.Linear(16, 8, bias=False)
        self.text_model = nn.ModuleDict({"final_layer_norm": nn.LayerNorm(16)})
        self.logit_scale = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.vision_model
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + tower.embeddings.position_embedding.weight
        for layer in tower.encoder.layers:
            x = layer(x)
        return x

    def in_the_authors_names(self) -> dict[str, Tensor]:
        """Tensors as the original release names them: `visual.` and `text.`, q, k and v joined."""
        given, found = self.state_dict(), {}
        prefix, patches = "vision_model.encoder.layers.", "vision_model.embeddings.patch_embedding"
        for key, value in given.items():
            if not key.startswith("vision_model."):
                continue
            name = key.replace(prefix, "visual.blocks.")
            name = name.replace("self_attn.out_proj", "attn.proj").replace("layer_norm", "norm")
            name = name.replace("vision_model.post_layernorm", "visual.norm")
            name = name.replace(patches, "visual.patch_embed.proj")
            if name.startswith("visual.") and "_proj" not in name:
                found[name] = value
        for number in range(len(self.vision_model.encoder.layers)):
            parts = [given[f"{prefix}{number}.self_attn.{n}_proj.weight"] for n in "qkv"]
            found[f"visual.blocks.{number}.attn.qkv.weight"] = torch.cat(parts)
        embeddings = "vision_model.embeddings."
        found["visual.cls_token"] = given[embeddings + "class_embedding"][None, None]
        found["visual.pos_embed"] = given[embeddings + "position_embedding.weight"][None]
        found["visual.head.weight"] = given["visual_projection.weight"]
        found["text.ln_final.weight"] = given["text_model.final_layer_norm.weight"]
        found["logit_scale"] = given["logit_scale"]
        return found
