"""A small diffusion transformer: SiT (arXiv:2401.08740) with the projection of REPA.

Dimension key: B = images, S = side in pixels, N = tokens, D = width, P = 3 x patch x patch pixels,
C = channels of the features that a block is aligned to, F = frequencies.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block that the time modulates, and that begins as the identity."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BND: Tensor, time_BD: Tensor) -> Tensor:
        changes = self.modulation(F.silu(time_BD))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = changes
        normed_BND = self.norms[0](x_BND) * (1 + scale1) + shift1
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(normed_BND).chunk(3, dim=-1)
        )
        attended_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BND = x_BND + gate1 * self.out(attended_BND)
        changed_BND: Tensor = x_BND + gate2 * self.mlp(self.norms[1](x_BND) * (1 + scale2) + shift2)
        return changed_BND


class SiT(nn.Module):
    """Noisy pixels and their time to velocity; and the middle block's state, projected."""

    def __init__(self, *, side: int, patch: int, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.patch, self.dim, self.middle = patch, dim, depth // 2
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads=dim // 32) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * patch**2))
        self.projection = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, channels)
        )

    def forward(self, x_B3SS: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        x_BND = self.embed(x_B3SS).flatten(2).transpose(1, 2) + self.position
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.dim // 2) / (self.dim // 2))
        angles_BF = 1000 * time_B[:, None] * frequencies
        time_BD = self.time(torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1))
        for number, block in enumerate(self.blocks, start=1):
            x_BND = block(x_BND, time_BD)
            if number == self.middle:
                projected_BNC = self.projection(x_BND)
        grid = x_B3SS.shape[-1] // self.patch
        velocity_BPN = self.head(x_BND).transpose(1, 2)
        folded = F.pixel_shuffle(velocity_BPN.unflatten(2, (grid, grid)), self.patch)
        return folded, projected_BNC


def losses(
    model: SiT, pixels_B3SS: Tensor, noise_B3SS: Tensor, time_B: Tensor, features_BNC: Tensor
) -> tuple[Tensor, Tensor]:
    """Velocity loss, and alignment loss: minus the mean cosine to the features."""
    time_B111 = time_B[:, None, None, None]
    noisy_B3SS = (1 - time_B111) * pixels_B3SS + time_B111 * noise_B3SS
    velocity_B3SS, projected_BNC = model(noisy_B3SS, time_B)
    velocity_loss = F.mse_loss(velocity_B3SS, noise_B3SS - pixels_B3SS)
    return velocity_loss, -F.cosine_similarity(projected_BNC, features_BNC, dim=-1).mean()
