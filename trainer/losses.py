"""The losses of the method, and the targets and sparsity level they use.

All tokens have unit norm (`trainer.channels.unit_tokens`); sums and products run in float32 at
least. Tokens of a crop come per crop: Q = B * K, the crops of the first image first. Tokens of a
whole image (the teacher's, the registers) come per image: B divides Q, and every function pairs
the Q / B neighbouring crops with their image. Repeating them per crop (B = Q) gives the same.

A batch may lie in parts of equal size in several processes. A function takes the own part then, and
`ranks` reaches the others: the mean over the ranks of a loss, and of its gradients, is that of the
whole batch.

Dimension key: B = images, Q = crops, N = tokens of a crop, M = tokens of an image, R = registers,
P = candidates of a crop, C = channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import full_precision, max_similarity, mean_logsumexp, widen
from trainer.distributed import ALONE, Ranks


class RefinementLoss(NamedTuple):
    """L_regu: `total = -alignment / temperature + strength * uniformity`.

    `alignment` is the mean cosine of clean student tokens and their targets, `uniformity` the mean
    logsumexp over the pool; all three carry gradients.
    """

    total: Tensor
    alignment: Tensor
    uniformity: Tensor


@torch.no_grad()
def match_targets(crop_tokens_QNC: Tensor, full_tokens_BMC: Tensor) -> Tensor:
    """Every token replaced by its nearest among the image's own tokens: `[Q, N, C]`, no gradient.

    Keeps targets on the distribution of whole-image features; a crop's own are slightly off it.

    Source: UniRefiner, arXiv:2605.19622, matched targets.
    """
    indices_QN = max_similarity(crop_tokens_QNC, full_tokens_BMC).indices
    full_tokens_QMC = _per_crop(widen(full_tokens_BMC), len(indices_QN))
    return _gather_tokens(full_tokens_QMC, indices_QN)


def usable(clean_QN: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The clean mask, or all tokens when not one of the batch is clean: a step needs some."""
    return clean_QN | (ranks.sum(clean_QN.sum()) == 0)


@full_precision
@torch.no_grad()
def sparsity_level(targets_QNC: Tensor, clean_QN: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """How alike unrelated clean tokens of the teacher are: s, a scalar, the same on all ranks.

    The mean cosine of the list of clean targets (crop after crop, rank after rank) with itself in
    reverse.

    Source: UniRefiner, arXiv:2605.19622, teacher's sparsity level.
    """
    own_nC = widen(targets_QNC)[usable(clean_QN, ranks)]
    if ranks.size == 1:
        return (own_nC * own_nC.flip(0)).sum(dim=-1).mean()
    counts = ranks.all(len(own_nC))
    num_clean, start = sum(counts), sum(counts[: ranks.rank])
    total = own_nC.new_zeros(())
    for peer, count in enumerate(counts):
        theirs_nC = own_nC if peer == ranks.rank else own_nC.new_empty(count, own_nC.shape[1])
        ranks.send(theirs_nC, peer)
        # Of the whole list, that rank has peer_start..peer_start + count; the partner of token i is
        # token num_clean - 1 - i.
        peer_start = sum(counts[:peer])
        first = max(start, num_clean - peer_start - count)
        end = min(start + len(own_nC), num_clean - peer_start)
        if first < end:
            partners_nC = theirs_nC[num_clean - end - peer_start : num_clean - first - peer_start]
            total += (own_nC[first - start : end - start] * partners_nC.flip(0)).sum()
    return ranks.sum(total) / num_clean


@full_precision
def refinement_loss(
    student_crop_QNC: Tensor,
    targets_QNC: Tensor,
    pool_BMC: Tensor,
    clean_QN: Tensor,
    *,
    temperature: float,
    uniformity: float,
    sparsity: float | Tensor,
    ranks: Ranks = ALONE,
) -> RefinementLoss:
    """L_regu: pull clean student tokens to their targets, and apart from the rest.

    Args:
        student_crop_QNC: Z_s^roi.
        targets_QNC: Matched or own teacher tokens.
        pool_BMC: Negatives: the image's teacher tokens when targets are matched, else the crop's.
        clean_QN: True = counts; all count when none does.
        temperature: t.
        uniformity: u, weight of the logsumexp.
        sparsity: s; pairs less similar than that are not pushed further apart.
        ranks: Who has the other parts of the batch.

    Source: UniRefiner, arXiv:2605.19622, L_regu.
    """
    student_crop_QNC = widen(student_crop_QNC)
    cosine_QN = (student_crop_QNC * widen(targets_QNC).detach()).sum(dim=-1)
    counted_QN = usable(clean_QN, ranks)
    num_counted = ranks.mean(counted_QN.sum().to(cosine_QN.dtype))
    alignment = cosine_QN.where(counted_QN, 0).sum() / num_counted
    spread = mean_logsumexp(
        student_crop_QNC,
        pool_BMC.detach(),
        temperature=temperature,
        threshold=sparsity,
        below="detach",
        weights_QN=counted_QN / num_counted,
    )
    return RefinementLoss(-alignment / temperature + uniformity * spread, alignment, spread)


def register_uniformity_loss(
    image_BMC: Tensor, registers_BRC: Tensor, *, temperature: float, affinity_floor: float
) -> Tensor:
    """L_uni: push the student's image tokens and register tokens of an image apart.

    Pairs less similar than `affinity_floor` (0.55) are far enough apart and pass no gradient.

    Source: UniRefiner, arXiv:2605.19622, L_uni.
    """
    return mean_logsumexp(
        image_BMC,
        registers_BRC,
        temperature=temperature,
        threshold=affinity_floor,
        below="detach",
    )


@full_precision
def absorption_loss(
    registers_BRC: Tensor,
    student_crop_QNC: Tensor,
    candidates_QPC: Tensor,
    teacher_full_BMC: Tensor,
    *,
    temperature: float,
    sparsity: float | Tensor,
    crop_weight: float = 0.2,
    crop_top: float = 0.1,
    sparsity_margin: float = 0.1,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L_spu: pull every register to the spurious token it resembles most, and the registers apart.

    Args:
        registers_BRC: Student registers.
        student_crop_QNC: Z_s^roi; gets no gradient from this loss.
        candidates_QPC: Teacher crop tokens that are likely spurious. Each is first replaced by its
            nearest token of the whole image.
        teacher_full_BMC: Z_t.
        temperature: t.
        sparsity: s. Registers whose absorbed tokens are less similar than that are left alone.
        crop_weight: Weight of the pull between the registers most like crop tokens and those.
        crop_top: Share of a crop's registers that this pull is for, rounded up.
        sparsity_margin: A pair below s counts as the constant s + margin.
        ranks: Who has the other parts of the batch.

    Source: UniRefiner, arXiv:2605.19622, L_spu; the pull towards crop tokens and the margin are of
    the authors' release.
    """
    registers_QRC = _per_crop(widen(registers_BRC), len(candidates_QPC))
    student_crop_QNC = widen(student_crop_QNC).detach()
    spurious_QPC = match_targets(candidates_QPC, teacher_full_BMC)
    absorbed_QRC = _best_of(spurious_QPC, registers_QRC)
    attraction = (registers_QRC * absorbed_QRC).sum(dim=-1).mean()

    likeness_QR = (registers_QRC * _best_of(student_crop_QNC, registers_QRC)).sum(dim=-1)
    top_Qr = likeness_QR.topk(math.ceil(crop_top * likeness_QR.shape[-1]), dim=-1).values
    is_close_Qr = top_Qr.detach() > sparsity
    # At least one of the whole batch.
    num_close = ranks.mean(is_close_Qr.sum().to(top_Qr.dtype)).clamp(min=1 / ranks.size)
    crop_pull = top_Qr.where(is_close_Qr, 0).sum() / num_close

    repulsion = mean_logsumexp(
        registers_QRC,
        absorbed_QRC,
        temperature=temperature,
        threshold=sparsity,
        below="replace",
        replacement=sparsity + sparsity_margin,
    )
    return -(attraction + crop_weight * crop_pull) / temperature + repulsion


@full_precision
def consistency_loss(student_crop_QNC: Tensor, target_QNC: Tensor, *, temperature: float) -> Tensor:
    """Keep the relations among a crop's tokens as the student sees them on the crop alone.

    Rows of cosines, scaled to [0, 1] row by row, compared by cross-entropy. The student's cosines
    pass gradients on the row side only (through the scaling too).

    Args:
        student_crop_QNC: Z_s^roi.
        target_QNC: The student's tokens of the crop view; no gradient.
        temperature: t.

    Source: arXiv:2504.02328, as in the authors' release of UniRefiner (variant `release`).
    """
    student_crop_QNC, target_QNC = widen(student_crop_QNC), widen(target_QNC).detach()
    student_QNN = _scale_rows(student_crop_QNC @ student_crop_QNC.detach().mT) / temperature
    target_QNN = _scale_rows(target_QNC @ target_QNC.mT) / temperature
    cross_entropy_QN = -(target_QNN.softmax(dim=-1) * student_QNN.log_softmax(dim=-1)).sum(dim=-1)
    return cross_entropy_QN.mean()


def _scale_rows(logits_QNN: Tensor) -> Tensor:
    low_QN1 = logits_QNN.amin(dim=-1, keepdim=True)
    spread_QN1 = logits_QNN.amax(dim=-1, keepdim=True) - low_QN1
    # A row of equal cosines has nothing to scale; the guard is far below any other row's spread.
    return (logits_QNN - low_QN1) / spread_QN1.clamp(min=1e-6)


def _best_of(tokens_QMC: Tensor, queries_QNC: Tensor) -> Tensor:
    """The token most similar to each query: `[Q, N, C]`."""
    return _gather_tokens(tokens_QMC, max_similarity(queries_QNC, tokens_QMC).indices)


def _gather_tokens(tokens_QMC: Tensor, indices_QN: Tensor) -> Tensor:
    return tokens_QMC.gather(1, indices_QN[..., None].expand(-1, -1, tokens_QMC.shape[-1]))


def _per_crop(tokens_BMC: Tensor, num_crops: int) -> Tensor:
    """The tokens of an image repeated for each of its crops: `[Q, M, C]`."""
    if num_crops % len(tokens_BMC):
        raise ValueError(f"{num_crops} crops do not belong evenly to {len(tokens_BMC)} images")
    return tokens_BMC.repeat_interleave(num_crops // len(tokens_BMC), dim=0)
