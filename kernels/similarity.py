"""The best match of every token among other tokens.

Dimension key: Q = query sets, G = key sets (Q = G * sets that share one), N = queries of a set,
M = keys of a set, C = channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.precision import full_precision, widen

# Products held at a time: 64 MiB of float32. Larger chunks gain nothing measurable.
CHUNK_ELEMENTS = 1 << 24


class BestMatch(NamedTuple):
    """`values_QN`, the highest dot product of each query, and `indices_QN`, the key that has it."""

    values: Tensor
    indices: Tensor


@full_precision
@torch.no_grad()
def max_similarity(queries_QNC: Tensor, keys_GMC: Tensor) -> BestMatch:
    """Highest dot product of each query with the keys of its set, and which key it is.

    Cosines when both sides have unit norm. Computed in float32 at least and without gradient
    (gather the winners where one is needed). The first key wins a tie. Never holds all N * M
    products of a large batch.

    Args:
        queries_QNC: Queries.
        keys_GMC: Keys; G divides Q, and every Q / G neighbouring query sets share one key set: an
            image's crops its tokens, or all of them one reference (G = 1).

    Source: the "max over j of cos" of UniRefiner's similarity filters and target matching,
    arXiv:2605.19622.
    """
    num_sets, num_queries, _ = queries_QNC.shape
    grouped_GXC = group_by_image(widen(queries_QNC), keys_GMC.shape[0])
    keys_GCM = widen(keys_GMC).to(grouped_GXC.dtype).mT
    chunk = max(1, CHUNK_ELEMENTS // (keys_GMC.shape[0] * keys_GMC.shape[1]))
    starts = range(0, grouped_GXC.shape[1], chunk)
    best = [(grouped_GXC[:, start : start + chunk] @ keys_GCM).max(dim=-1) for start in starts]
    return BestMatch(
        torch.cat([part.values for part in best], dim=1).view(num_sets, num_queries),
        torch.cat([part.indices for part in best], dim=1).view(num_sets, num_queries),
    )


def group_by_image(tokens_QNC: Tensor, num_images: int) -> Tensor:
    """The tokens of neighbouring sets joined, so that one set is left for each image: [G, X, C]."""
    num_sets, num_tokens, channels = tokens_QNC.shape
    if num_sets % num_images:
        raise ValueError(f"{num_sets} token sets cannot share {num_images} sets evenly")
    return tokens_QNC.reshape(num_images, num_sets // num_images * num_tokens, channels)
