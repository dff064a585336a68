"""What the demo backbone learns: predict what is hidden, know the scene, know the place.

Two crops of a photograph are masked; the encoder sees the rest. Four losses, all on tokens after
the encoder's final norm, which are the tokens that the backbone later serves:

* masked prediction: a light decoder predicts, for each hidden patch, its oriented gradient energy
  (a small HOG) and its colours at low resolution;
* scene: the class tokens of the two crops find each other among all photographs of the batch;
* place: visible patches of the two crops that show the same spot find each other among the
  patches of the batch, those of the same photograph included;
* spread: the mean squared cosine of any two patches is small, so that no few directions carry all.

Dimension key: V = views (2B), N = patches, K = visible patches, P = pairs, C = encoder channels,
D = target values.

Sources: MaskFeat, arXiv:2112.09133 (targets); CAN, arXiv:2210.16870 (masked views with a
contrastive term); the correspondence of places is that of PixPro, arXiv:2011.10043, on patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

NUM_ORIENTATIONS = 8
CELL = 8  # pixels; the side of a gradient histogram's cell
COLOUR_CELL = 4  # pixels
DECODER_WIDTH = 128
PROJECTION = 128
SAME_PLACE = 0.7  # patches; nearest patches within this distance are a positive pair
TOO_CLOSE = 1.5  # patches; within this distance a patch is not used as a negative
MAX_PAIRS = 1024
NEAR_ZERO = 1e-6


class LossWeights(NamedTuple):
    """In the order of the losses."""

    masked: float = 1.0
    scene: float = 0.1
    place: float = 0.1
    spread: float = 0.5


class Losses(NamedTuple):
    """`total` is the weighted sum; the others are unweighted."""

    total: Tensor
    masked: Tensor
    scene: Tensor
    place: Tensor
    spread: Tensor
    num_pairs: int


def gradient_and_colour(pixels_V3SS: Tensor, *, patch_size: int) -> Tensor:
    """Target of each patch: oriented gradient energy per cell, and colour at low resolution."""
    grey_VSS = pixels_V3SS.mean(dim=1)
    padded_VSS = F.pad(grey_VSS, (1, 1, 1, 1), mode="replicate")
    dx_VSS = (padded_VSS[:, 1:-1, 2:] - padded_VSS[:, 1:-1, :-2]) / 2
    dy_VSS = (padded_VSS[:, 2:, 1:-1] - padded_VSS[:, :-2, 1:-1]) / 2
    # One orientation at a time: all at once is a buffer of eight images per view.
    energies = []
    for step in range(NUM_ORIENTATIONS):
        angle = step * 2 * math.pi / NUM_ORIENTATIONS
        energy_VSS = (dx_VSS * math.cos(angle)).add_(dy_VSS, alpha=math.sin(angle)).relu_()
        energies.append(F.avg_pool2d(energy_VSS, CELL))
    cells_VOcc = torch.stack(energies, dim=1)
    histogram_VND = F.unfold(cells_VOcc, patch_size // CELL, stride=patch_size // CELL).transpose(
        1, 2
    )
    # The floor keeps sensor noise in flat sky from counting as much as an edge.
    histogram_VND = histogram_VND / (histogram_VND.norm(dim=-1, keepdim=True) + 0.05)
    colour_V3cc = F.avg_pool2d(pixels_V3SS, COLOUR_CELL)
    patch_cells = patch_size // COLOUR_CELL
    colour_VND = F.unfold(colour_V3cc, patch_cells, stride=patch_cells).transpose(1, 2)
    # Both halves to about unit variance per value, so that neither swamps the other.
    return torch.cat([histogram_VND * math.sqrt(histogram_VND.shape[-1]), colour_VND * 2.0], dim=-1)


def encode_visible(encoder: VisionTransformer, pixels_V3SS: Tensor, visible_VK: Tensor) -> Tensor:
    """Class token and visible patch tokens after the final norm, `[V, 1 + K, C]`.

    Hidden patches are dropped before the patch embedding, which is then a plain matrix product:
    timm's convolution over all patches took two fifths of a step on a CPU.
    """
    convolution = encoder.patch_embed.proj
    assert isinstance(convolution, nn.Conv2d)
    patch = convolution.kernel_size[0]
    grid = pixels_V3SS.shape[-1] // patch
    pixels_V3gpgp = pixels_V3SS.reshape(len(pixels_V3SS), 3, grid, patch, grid, patch)
    pixels_VND = pixels_V3gpgp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    visible_VKD = pixels_VND.gather(1, visible_VK[..., None].expand(-1, -1, pixels_VND.shape[-1]))
    patches_VKC = F.linear(visible_VKD, convolution.weight.flatten(1), convolution.bias)
    # Resampled as timm does it, so that the served backbone sees the positions it was trained with.
    position_1NC = resample_abs_pos_embed(
        encoder.pos_embed, [grid, grid], num_prefix_tokens=encoder.num_prefix_tokens
    )
    patches_VKC = patches_VKC + position_1NC[0, 1:][visible_VK]
    class_V1C = (encoder.cls_token + position_1NC[:, :1]).expand(len(pixels_V3SS), -1, -1)
    tokens_VTC = torch.cat([class_V1C, patches_VKC], dim=1)
    normed_VTC: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(tokens_VTC)))
    return normed_VTC


class MaskedDecoder(nn.Module):
    """One narrow transformer block that fills in the hidden patches."""

    def __init__(self, width_in: int, num_targets: int, *, base_grid: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, DECODER_WIDTH)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.position = nn.Parameter(torch.randn(1, base_grid**2, DECODER_WIDTH) * 0.02)
        self.block = Block(DECODER_WIDTH, num_heads=4, qkv_bias=True)
        self.head = nn.Sequential(
            nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, num_targets)
        )

    def forward(self, tokens_VTC: Tensor, visible_VK: Tensor, hidden_VH: Tensor) -> Tensor:
        """Predict the targets of the hidden patches, `[V, H, D]`."""
        embedded_VTd = self.embed(tokens_VTC)
        num_patches = visible_VK.shape[1] + hidden_VH.shape[1]
        grid = math.isqrt(num_patches)
        position_1Nd = resample_abs_pos_embed(self.position, [grid, grid], num_prefix_tokens=0)
        position_VNd = position_1Nd.expand(len(tokens_VTC), -1, -1)

        def at(index: Tensor) -> Tensor:
            rows: Tensor = position_VNd.gather(1, index[..., None].expand(-1, -1, DECODER_WIDTH))
            return rows

        filled = torch.cat(
            [
                embedded_VTd[:, :1],
                embedded_VTd[:, 1:] + at(visible_VK),
                self.hidden_token + at(hidden_VH),
            ],
            dim=1,
        )
        predicted: Tensor = self.head(self.block(filled)[:, -hidden_VH.shape[1] :])
        return predicted


def projector(width_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, PROJECTION))


def info_nce(
    first_PD: Tensor, second_PD: Tensor, *, temperature: float, is_excluded_PP: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy of finding each row's partner among all rows of the other side."""
    first_PD = F.normalize(first_PD.float(), dim=-1)
    second_PD = F.normalize(second_PD.float(), dim=-1)
    logits_PP = first_PD @ second_PD.T / temperature
    if is_excluded_PP is not None:
        logits_PP = logits_PP.masked_fill(is_excluded_PP, -math.inf)
    partner_P = torch.arange(len(logits_PP))
    return (F.cross_entropy(logits_PP, partner_P) + F.cross_entropy(logits_PP.T, partner_P)) / 2


def mean_squared_cosine(tokens_TC: Tensor) -> Tensor:
    """Mean over all pairs of tokens: 1 if all point one way, 1 / C if no direction stands out."""
    unit_TC = F.normalize(tokens_TC.float(), dim=-1)
    return (unit_TC.T @ unit_TC / len(unit_TC)).square().sum()


class PlacePairs(NamedTuple):
    """Pairs of visible patches that show the same spot; indices into photographs and patches."""

    photo_P: Tensor
    first_P: Tensor
    second_P: Tensor
    is_excluded_PP: Tensor  # too close to be a negative


def match_places(
    centre_VK2: Tensor, patch_side_V: Tensor, generator: torch.Generator
) -> PlacePairs:
    """Pair each visible patch of a first view with the nearest of the second, if near enough."""
    first_BK2, second_BK2 = centre_VK2.chunk(2)
    first_side_B, second_side_B = patch_side_V.chunk(2)
    side_B = (first_side_B * second_side_B).sqrt()
    nearest = (torch.cdist(first_BK2, second_BK2) / side_B[:, None, None]).min(dim=2)
    photo_P, first_P = (nearest.values < SAME_PLACE).nonzero(as_tuple=True)
    chosen = torch.randperm(len(photo_P), generator=generator)[:MAX_PAIRS]
    photo_P, first_P = photo_P[chosen], first_P[chosen]
    second_P = nearest.indices[photo_P, first_P]
    distance_PP = torch.cdist(first_BK2[photo_P, first_P], second_BK2[photo_P, second_P])
    is_same_photo_PP = photo_P[:, None] == photo_P[None, :]
    is_excluded_PP = is_same_photo_PP & (distance_PP < TOO_CLOSE * side_B[photo_P][:, None])
    is_excluded_PP.fill_diagonal_(False)
    return PlacePairs(photo_P, first_P, second_P, is_excluded_PP)


class Objective(nn.Module):
    """The losses and the heads that they need; the heads are thrown away after pre-training."""

    def __init__(
        self, width: int, *, patch_size: int, base_grid: int, weights: LossWeights
    ) -> None:
        super().__init__()
        num_targets = (
            NUM_ORIENTATIONS * (patch_size // CELL) ** 2 + 3 * (patch_size // COLOUR_CELL) ** 2
        )
        self.patch_size = patch_size
        self.weights = weights
        self.decoder = MaskedDecoder(width, num_targets, base_grid=base_grid)
        self.scene_projector = projector(width, 512)
        # Linear: what tells places apart has to be plain in the tokens themselves.
        self.place_projector = nn.Linear(width, PROJECTION)

    def forward(
        self,
        encoder: VisionTransformer,
        pixels_V3SS: Tensor,
        seen_V3SS: Tensor,
        centre_VN2: Tensor,
        patch_side_V: Tensor,
        *,
        visible_fraction: float,
        generator: torch.Generator,
    ) -> Losses:
        """Losses of views `pixels_V3SS` of which the encoder is shown `seen_V3SS`."""
        num_views, num_patches = centre_VN2.shape[:2]
        num_visible = round(num_patches * visible_fraction)
        order_VN = torch.rand(num_views, num_patches, generator=generator).argsort(dim=1)
        visible_VK, hidden_VH = order_VN[:, :num_visible], order_VN[:, num_visible:]

        with torch.autocast("cpu", torch.bfloat16):
            tokens_VTC = encode_visible(encoder, seen_V3SS, visible_VK)
            predicted_VHD = self.decoder(tokens_VTC, visible_VK, hidden_VH).float()
            scene_VD = self.scene_projector(tokens_VTC[:, 0])
        target_VND = gradient_and_colour(pixels_V3SS, patch_size=self.patch_size)
        target_VHD = target_VND.gather(1, hidden_VH[..., None].expand_as(predicted_VHD))
        masked = F.mse_loss(predicted_VHD, target_VHD)
        scene = info_nce(*scene_VD.chunk(2), temperature=0.15)

        centre_VK2 = centre_VN2.gather(1, visible_VK[..., None].expand(-1, -1, 2))
        pairs = match_places(centre_VK2, patch_side_V, generator)
        first_BKC, second_BKC = tokens_VTC[:, 1:].chunk(2)
        with torch.autocast("cpu", torch.bfloat16):
            first_PD = self.place_projector(first_BKC[pairs.photo_P, pairs.first_P])
            second_PD = self.place_projector(second_BKC[pairs.photo_P, pairs.second_P])
        place = info_nce(first_PD, second_PD, temperature=0.15, is_excluded_PP=pairs.is_excluded_PP)

        spread = mean_squared_cosine(tokens_VTC[:, 1:].flatten(0, 1))

        losses = (masked, scene, place, spread)
        total = torch.stack([w * loss for w, loss in zip(self.weights, losses, strict=True)]).sum()
        return Losses(total, *losses, len(pairs.photo_P))
