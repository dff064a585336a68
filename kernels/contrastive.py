"""The denominator of a contrastive loss: logsumexp over similarities, with a floor.

Dimension key: Q = row sets, G = column sets (Q = G * sets that share one), N = rows of a set,
M = columns of a set, C = channels.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.precision import full_precision, widen
from kernels.similarity import group_by_image

Below = Literal["detach", "replace"]


@full_precision
def similarity_logsumexp(
    rows_QNC: Tensor,
    columns_GMC: Tensor,
    *,
    temperature: float,
    threshold: float | Tensor,
    below: Below,
    replacement: float | Tensor | None = None,
) -> Tensor:
    """`logsumexp_j(a_ij / temperature)` of the dot products `a_ij` of rows and columns.

    Pairs that are already dissimilar (`a_ij < threshold`) must not be pushed further apart, so
    they pass no gradient: `below="detach"` keeps their value, `below="replace"` puts the constant
    `replacement` in its place. Differentiable in rows and columns.

    Args:
        rows_QNC: Unit norm; computed in float32 at least.
        columns_GMC: Unit norm; G divides Q, neighbouring row sets share a column set.
        temperature: Divides every similarity.
        threshold: A similarity, before the temperature.
        below: What becomes of the pairs below the threshold.
        replacement: A similarity, before the temperature; for `below="replace"` alone.

    Returns:
        `logsumexp_QN`.

    Source: the uniformity terms of L_regu, L_uni and L_spu of UniRefiner, arXiv:2605.19622.
    """
    if (replacement is not None) != (below == "replace"):
        raise ValueError(f"replacement={replacement} does not go with below={below!r}")
    num_sets, num_rows, _ = rows_QNC.shape
    rows_GXC = group_by_image(widen(rows_QNC), columns_GMC.shape[0])
    similarity_GXM = rows_GXC @ widen(columns_GMC).to(rows_GXC.dtype).mT
    constant = similarity_GXM.detach()
    is_below_GXM = constant < threshold
    if replacement is not None:
        constant = constant.new_zeros(()) + replacement
    floored_GXM = torch.where(is_below_GXM, constant, similarity_GXM)
    return (floored_GXM / temperature).logsumexp(dim=-1).view(num_sets, num_rows)
