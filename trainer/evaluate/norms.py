"""Tokens of outlying norm: a sign of patches that hold something else than what is at their place.

A large backbone turns some patch tokens of little content into memory of its own, and their norms
stand out many times over ("Vision Transformers Need Registers", arXiv:2309.16588, which calls them
artifacts). There a fixed norm, 150 for DINOv2-g, tells them from the others; here they are counted
by an image's own spread, so that backbones can be compared.

Norms are those of the residual stream: the final norm makes all tokens about equally long.

Dimension key: B = images, N = tokens of an image, C = channels.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from backbone import DenseEncoder

DEVIATIONS = 5.0
"""Robust deviations from which a norm is an outlier; of normal ones, one in three million is."""
_NORMAL = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations


class NormOutliers(NamedTuple):
    """Of each image.

    `share_B` is the share of its tokens whose norm is an outlier, 0 to 1; `peak_B` the greatest
    norm over the median one, 1 or more.
    """

    share_B: Tensor
    peak_B: Tensor


def norm_outliers(tokens_BNC: Tensor, *, deviations: float = DEVIATIONS) -> NormOutliers:
    """Count tokens longer than the median by more than `deviations` times 1.4826 MAD.

    Args:
        tokens_BNC: Before the final norm.
        deviations: Robust standard deviations; MAD is the median absolute deviation of the image's
            norms, and 1.4826 makes it the standard deviation where they are normal.

    Source: "Vision Transformers Need Registers", arXiv:2309.16588, section 2; the rule is ours.
    """
    norms_BN = tokens_BNC.float().norm(dim=-1)
    median_B1 = norms_BN.quantile(0.5, dim=-1, keepdim=True)
    spread_B1 = (norms_BN - median_B1).abs().quantile(0.5, dim=-1, keepdim=True)
    # Equal norms differ by rounding, which must not count where the spread is nothing.
    limit_B1 = median_B1 * (1 + 1e-5) + deviations * _NORMAL * spread_B1
    peak_B = norms_BN.amax(dim=-1) / median_B1[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    return NormOutliers((norms_BN > limit_B1).double().mean(dim=-1), peak_B.double())


def before_final_norm(encoder: DenseEncoder) -> DenseEncoder:
    """The same encoder and weights, whose tokens do not pass through the backbone's final norm."""
    plain = copy.copy(encoder)
    plain.backbone = copy.copy(encoder.backbone)
    plain.backbone.dense_norm = False
    return plain
