"""The channel mask, and the normalisation that every cosine of the method goes through.

Some backbones have a few channels of huge, nearly constant value that swamp every cosine. They are
set to zero before tokens are normalised.

Dimension key: I = images, N = tokens of an image, C = channels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import full_precision, widen

StopReason = Literal["threshold", "gain", "max_channels"]


class ChannelMask(NamedTuple):
    """The channels to zero, in the order they were found; why the search ended; what it reached."""

    channels: list[int]
    stop_reason: StopReason
    cosine: float


def mask_channels(tokens: Tensor, channels: Tensor | None) -> Tensor:
    """The tokens `[..., C]` with the given channels (int64 indices on their device) at zero."""
    return tokens if channels is None else tokens.index_fill(-1, channels, 0)


@full_precision
def unit_tokens(tokens: Tensor, channels: Tensor | None = None) -> Tensor:
    """Channel-masked tokens `[..., C]` of unit norm, in float32 at least.

    The one normalisation of the method: everything that a filter or a loss of this package takes
    went through it.
    """
    return F.normalize(mask_channels(widen(tokens), channels), dim=-1)


@torch.no_grad()
def find_channel_mask(
    bank_INC: Tensor,
    *,
    max_channels: int = 5,
    threshold: float = 0.2,
    min_gain: float = 0.005,
    candidate_pool: int = 16,
) -> ChannelMask:
    """Find, greedily, the channels that make tokens of unrelated images look alike.

    Each round ranks the channels by their share of the cross-image cosine times how constant they
    are within an image, tries the best, and takes the one whose removal lowers the cosine most.

    Args:
        bank_INC: Raw tokens of several images, as many from each.
        max_channels: Rounds at most; 0 finds nothing.
        threshold: Cross-image cosine that is low enough to stop at.
        min_gain: A round that lowers the cosine by less takes nothing and ends the search.
        candidate_pool: Channels tried in a round.

    Source: UniRefiner, arXiv:2605.19622, channel mask of the authors' release.
    Differs: a bank that starts at or below the threshold loses no channel.
    """
    bank_INC = widen(bank_INC)
    constancy_C = _constancy(bank_INC)
    channels: list[int] = []
    cosine, shares_C = _cross_image_cosine(bank_INC, channels)
    while cosine > threshold:
        if len(channels) == max_channels:
            return ChannelMask(channels, "max_channels", cosine)
        score_C = shares_C * constancy_C
        score_C[channels] = -torch.inf
        num_candidates = min(candidate_pool, len(score_C) - len(channels))
        candidates = score_C.topk(num_candidates).indices.tolist()
        trials = {c: _cross_image_cosine(bank_INC, [*channels, c]) for c in candidates}
        best = min(trials, key=lambda c: trials[c][0], default=None)
        if best is None or cosine - trials[best][0] < min_gain:
            return ChannelMask(channels, "gain", cosine)
        channels.append(best)
        cosine, shares_C = trials[best]
    return ChannelMask(channels, "threshold", cosine)


def _constancy(bank_INC: Tensor) -> Tensor:
    """Squared mean over variance of every channel within an image, averaged over images."""
    mean_IC, variance_IC = bank_INC.mean(dim=1), bank_INC.var(dim=1)
    return (mean_IC.square() / (variance_IC + 1e-6)).mean(dim=0)


def _cross_image_cosine(bank_INC: Tensor, channels: list[int]) -> tuple[float, Tensor]:
    """Mean cosine of tokens of different images, and the part of it that each channel makes.

    Tokens are paired by flipping images and tokens, which pairs no token with itself when the
    number of images is even.
    """
    index = torch.tensor(channels, dtype=torch.int64, device=bank_INC.device)
    unit_INC = unit_tokens(bank_INC, index)
    shares_C = (unit_INC * unit_INC.flip(0, 1)).mean(dim=(0, 1))
    return shares_C.sum().item(), shares_C
