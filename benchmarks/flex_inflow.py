"""The paper's attention inflow by FlexAttention: the oracle and the competitor of the own kernel.

With the roles swapped (keys ask, queries answer), the log-sum-exp over queries i of
`score(i, j) - lse(i)` is the logarithm of what key j receives.

Dimension key: B = samples, H = heads, T = tokens, N = tokens, D = channels of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention


def attention_inflow_by_flex(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    *,
    rejected_BN: Tensor | None = None,
    lse_BHN: Tensor | None = None,
    flex: Callable[..., Any] = flex_attention,
) -> Tensor:
    """The `paper` flow of `kernels.attention_inflow` among all tokens.

    Args:
        q_BHTD, k_BHTD: As there.
        rejected_BN: As there; no sample may have all of its keys rejected.
        lse_BHN: Log-sum-exp of the scores over keys that are not rejected, if it is known.
        flex: `flex_attention`, compiled or not: uncompiled it holds all scores.

    Returns:
        `inflow_BN`, float32; 0 for rejected keys.
    """
    if lse_BHN is None:
        drop_rejected = None
        if rejected_BN is not None:

            def drop_rejected(
                score: Tensor, b: Tensor, _h: Tensor, _i: Tensor, j: Tensor
            ) -> Tensor:
                return torch.where(rejected_BN[b, j], -torch.inf, score)

        lse_BHN = _lse(flex, q_BHTD, k_BHTD, drop_rejected)
    lse = lse_BHN

    def share(score: Tensor, b: Tensor, h: Tensor, _j: Tensor, i: Tensor) -> Tensor:
        return score - lse[b, h, i]

    inflow_BN = _lse(flex, k_BHTD, q_BHTD, share).exp().mean(dim=1)
    return inflow_BN if rejected_BN is None else inflow_BN.masked_fill(rejected_BN, 0)


def _lse(
    flex: Callable[..., Any],
    asking_BHTD: Tensor,
    answering_BHTD: Tensor,
    score_mod: Callable[..., Tensor] | None,
) -> Tensor:
    _, aux = flex(
        asking_BHTD,
        answering_BHTD,
        answering_BHTD,  # values nobody looks at
        score_mod=score_mod,
        return_aux=AuxRequest(lse=True),
    )
    lse_BHN: Tensor = aux.lse
    return lse_BHN
