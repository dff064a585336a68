"""Spurious-token filters.

Every filter is a pure function without gradient and returns a mask that is `True` where a token is
clean. Tokens have unit norm (`trainer.channels.unit_tokens`).

Dimension key: Q = crops, N = tokens of a crop, S = tokens of unrelated content, D = detectors,
R = candidates to draw, T = all tokens of a composite, C = channels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels import Flow, attention_inflow, full_precision, max_similarity, widen
from trainer.distributed import ALONE, Ranks

Criterion = Literal["cosine", "zscore"]


def max_cosine_scores(tokens_QNC: Tensor, comparison_QSC: Tensor) -> Tensor:
    """How closely each token resembles its best match in content it cannot contain: `scores_QN`.

    Args:
        tokens_QNC: The teacher's crop tokens.
        comparison_QSC: Tokens of the reference image, `[1, S, C]` for all crops (finds fixed
            patterns, FP), or of the strip pasted beside each crop (finds global proxies, GP).

    Source: UniRefiner, arXiv:2605.19622, FP-GP similarity path.
    """
    return max_similarity(tokens_QNC, comparison_QSC).values


@full_precision
@torch.no_grad()
def below_threshold(scores_QN: Tensor, *, criterion: Criterion, threshold: float) -> Tensor:
    """Clean where a score is low enough: `is_clean_QN`.

    Args:
        scores_QN: Of `max_cosine_scores`.
        criterion: `cosine` compares with the threshold itself; `zscore` with the mean of the sample
            plus `threshold` unbiased standard deviations of it, for backbones whose cosines are
            all high or all low.
        threshold: A cosine, or a number of standard deviations.

    Source: UniRefiner, arXiv:2605.19622, FP-GP similarity path.
    """
    scores_QN = widen(scores_QN)
    if criterion == "cosine":
        return scores_QN < threshold
    mean_Q1 = scores_QN.mean(dim=-1, keepdim=True)
    deviation_Q1 = scores_QN.std(dim=-1, keepdim=True)
    return scores_QN < mean_Q1 + threshold * deviation_Q1


def register_guided(targets_QNC: Tensor, detectors_QDC: Tensor, *, threshold: float) -> Tensor:
    """Clean where a target resembles none of the student's registers: `is_clean_QN`.

    Registers collect what is spurious, so what looks like one is spurious too.

    Args:
        targets_QNC: Target tokens.
        detectors_QDC: Student register tokens chosen as detectors, `[B, D, C]` when an image's
            crops share them (B divides Q).
        threshold: Cosine.

    Source: UniRefiner, arXiv:2605.19622, closing the loop.
    """
    return max_similarity(targets_QNC, detectors_QDC).values < threshold


@torch.no_grad()
def crop_inflow(
    taps: Sequence[tuple[Tensor, Tensor]],
    crop_index_N: Tensor | None,
    rejected_QN: Tensor | None = None,
    *,
    variant: Flow,
) -> Tensor:
    """Attention that each crop token receives from the crop's tokens, mean over layers.

    Args:
        taps: Queries and keys `[Q, heads, T, head width]` of each layer of the range, as the
            teacher's pass over the composites left them.
        crop_index_N: Positions of the crop's tokens among the T (prefix and strip left out), int64
            in raster order; None when they are all of them.
        rejected_QN: True = an earlier filter rejected this token: its key is left out.
        variant: See `kernels.attention_inflow`.

    Returns:
        `inflow_QN`.

    Raises:
        ValueError: there are no taps.

    Source: UniRefiner, arXiv:2605.19622, attention-flow path.
    """
    total_QN: Tensor | None = None
    for q, k in taps:
        total_QN = attention_inflow(
            q,
            k,
            variant=variant,
            index_N=crop_index_N,
            rejected_BN=rejected_QN,
            into_BN=total_QN,
        )
    if total_QN is None:
        raise ValueError("no layer was tapped; give crop_inflow the q and k of one at least")
    return total_QN / len(taps)


@full_precision
@torch.no_grad()
def attention_hijack(
    inflow_QN: Tensor, kept_QN: Tensor, *, threshold: float, ranks: Ranks = ALONE
) -> Tensor:
    """Clean where a token that was kept so far receives enough attention: `is_clean_QN`.

    Enough is more than mean + threshold * unbiased standard deviation, both over all kept tokens of
    the batch. With fewer than two of them there is no deviation, and what was kept stays.

    Args:
        inflow_QN: Of `crop_inflow`.
        kept_QN: True = clean by the earlier filters.
        threshold: Standard deviations; negative, so that only the overwritten few are rejected.
        ranks: Who has the other parts of the batch; the statistics are of all.

    Source: UniRefiner, arXiv:2605.19622, attention hijackees.
    """
    inflow_QN = widen(inflow_QN)
    num_kept = ranks.sum(kept_QN.sum())
    mean = ranks.sum(inflow_QN.where(kept_QN, 0).sum()) / num_kept.clamp(min=1)
    squares_QN = (inflow_QN - mean).square().where(kept_QN, 0)
    deviation = (ranks.sum(squares_QN.sum()) / (num_kept - 1).clamp(min=1)).sqrt()
    is_fed_QN = inflow_QN > mean + threshold * deviation
    return kept_QN & (is_fed_QN | (num_kept < 2))


@torch.no_grad()
def sample_candidates(scores_QN: Tensor, draws_QR: Tensor, *, share: float = 0.4) -> Tensor:
    """Draw likely spurious tokens, for the registers to absorb: `indices_QR`.

    Uniformly and with replacement from the tokens with the highest scores.

    Args:
        scores_QN: Of one FP-GP comparison.
        draws_QR: Uniform in [0, 1).
        share: Part of the tokens to draw from; rounded down, one token at least.

    Source: UniRefiner, arXiv:2605.19622, candidates for absorption.
    """
    num_eligible = max(1, int(share * scores_QN.shape[-1]))
    eligible_Qn = scores_QN.topk(num_eligible, dim=-1).indices
    # Rounding can carry a draw just below 1 up to it.
    picks_QR = (draws_QR * num_eligible).long().clamp(max=num_eligible - 1)
    return eligible_Qn.gather(-1, picks_QR)
