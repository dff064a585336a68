"""How much attention each token receives.

Dimension key: B = samples, H = heads, N = tokens, D = channels of a head.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.precision import full_precision, widen

Flow = Literal["paper", "release"]


@full_precision
@torch.no_grad()
def attention_inflow(
    q_BHND: Tensor, k_BHND: Tensor, *, variant: Flow, rejected_BN: Tensor | None = None
) -> Tensor:
    """Sum of the attention that each token gets from all tokens: the column sums of the attention.

    A token that gets little of it has no say in the other tokens' values, while being overwritten
    by theirs. The mean of a sample is 1 in either variant when no key is left out.

    Args:
        q_BHND, k_BHND: Queries and keys of one layer as projected, before rotary embedding.
        variant: `paper` is scaled dot-product attention per head, averaged over heads; a rejected
            key gets none of it. `release` joins the heads, scales q and k to unit norm and uses no
            other scale; a rejected key is a vector of zeros, which still takes its share.
        rejected_BN: True = leave this key out.

    Returns:
        `inflow_BN`, float32 at least. Entries of rejected tokens mean nothing.

    Source: UniRefiner, arXiv:2605.19622, attention-flow path (attention hijackees); `release`: the
    authors' code.
    """
    q_BHND, k_BHND = widen(q_BHND), widen(k_BHND)
    if variant == "release":
        q_BNC = F.normalize(q_BHND.transpose(1, 2).flatten(2), dim=-1)
        k_BNC = F.normalize(k_BHND.transpose(1, 2).flatten(2), dim=-1)
        if rejected_BN is not None:
            k_BNC = k_BNC.masked_fill(rejected_BN[..., None], 0)
        return (q_BNC @ k_BNC.mT).softmax(dim=-1).sum(dim=-2)

    num_heads, head_width = q_BHND.shape[1], q_BHND.shape[-1]
    inflow_BN = q_BHND.new_zeros(q_BHND.shape[0], q_BHND.shape[2])
    # Head by head: all heads at once would hold H * N * N numbers for every sample.
    for q_BND, k_BND in zip(q_BHND.unbind(1), k_BHND.unbind(1), strict=True):
        logits_BNN = q_BND @ k_BND.mT * head_width**-0.5
        if rejected_BN is not None:
            # Not -inf: a sample whose keys are all rejected must not turn into NaN.
            floor = torch.finfo(logits_BNN.dtype).min
            logits_BNN = logits_BNN.masked_fill(rejected_BN[:, None, :], floor)
        inflow_BN += logits_BNN.softmax(dim=-1).sum(dim=-2) / num_heads
    return inflow_BN
