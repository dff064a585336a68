"""What a step asks of its tokens: which of them are clean, and the losses.

Dimension key: B = images, K = crops of an image, Q = B * K crops, N = tokens of an image or crop,
R = registers, D = detectors, P = candidates of a crop, C = channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import FiltersSection, LossSection
from trainer.distributed import Ranks
from trainer.draws import StepDraws
from trainer.filters import (
    attention_hijack,
    below_threshold,
    crop_inflow,
    register_guided,
    sample_candidates,
)
from trainer.losses import (
    absorption_loss,
    refinement_loss,
    register_uniformity_loss,
    sparsity_level,
)


class Comparisons(NamedTuple):
    """Likeness of the teacher's crop tokens to the reference image and to the strip."""

    reference_QN: Tensor
    strip_QN: Tensor


class StudentView(NamedTuple):
    """Unit tokens with gradient."""

    image_BNC: Tensor
    registers_BRC: Tensor
    crop_QNC: Tensor


class TeacherView(NamedTuple):
    """Unit tokens without gradient; `taps` are queries and keys of the crops' tokens."""

    full_BNC: Tensor
    crop_QNC: Tensor
    scores: Comparisons
    taps: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def find_clean(
    targets_QNC: Tensor,
    student: StudentView,
    teacher: TeacherView,
    draws: StepDraws,
    section: FiltersSection,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clean mask [Q, N], and the share of tokens that each filter leaves: of all, and for
    `attention_hijack` of what the filters before it kept. The teacher's taps are used up."""
    fp_gp, guided = section.fp_gp, section.register_guided
    hijack, scores = section.attention_hijack, teacher.scores
    clean_QN = torch.ones_like(scores.reference_QN, dtype=torch.bool)
    shares: dict[str, Tensor] = {}
    if fp_gp.enabled:
        for name, score_QN in (("fixed_pattern", scores[0]), ("global_proxy", scores[1])):
            passed_QN = below_threshold(
                score_QN, criterion=fp_gp.criterion, threshold=fp_gp.threshold
            )
            shares[f"clean_{name}"] = passed_QN.float().mean()
            clean_QN = clean_QN & passed_QN
    if guided.enabled:
        index = draws.detectors_BD.to(clean_QN.device)[..., None]
        detectors_BDC = student.registers_BRC.detach().take_along_dim(index, dim=1)
        passed_QN = register_guided(targets_QNC, detectors_BDC, threshold=guided.threshold)
        shares["clean_register_guided"] = passed_QN.float().mean()
        clean_QN = clean_QN & passed_QN
    if hijack.enabled:
        inflow_QN = crop_inflow(teacher.taps, None, ~clean_QN, variant=hijack.variant)
        teacher.taps.clear()  # as large as all the other tokens together
        kept = ranks.mean(clean_QN.sum().float()).clamp(min=1 / ranks.size)
        clean_QN = attention_hijack(inflow_QN, clean_QN, threshold=hijack.threshold, ranks=ranks)
        shares["clean_attention_hijack"] = clean_QN.sum() / kept
    shares["clean"] = clean_QN.float().mean()
    return clean_QN, shares


def sum_losses(
    student: StudentView,
    teacher: TeacherView,
    targets_QNC: Tensor,
    clean_QN: Tensor,
    candidates_QPC: Tensor,
    section: LossSection,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, but for spatial consistency, and its terms."""
    sparsity = sparsity_level(targets_QNC, clean_QN, ranks)
    refinement = refinement_loss(
        student.crop_QNC,
        targets_QNC,
        teacher.full_BNC if section.matched else teacher.crop_QNC,
        clean_QN,
        temperature=section.temperature,
        uniformity=section.uniformity,
        sparsity=sparsity,
        ranks=ranks,
    )
    register_uniformity = register_uniformity_loss(
        student.image_BNC,
        student.registers_BRC,
        temperature=section.temperature,
        affinity_floor=section.affinity_floor,
    )
    absorption = absorption_loss(
        student.registers_BRC,
        student.crop_QNC,
        candidates_QPC,
        teacher.full_BNC,
        temperature=section.temperature,
        sparsity=sparsity,
        crop_weight=section.crop_weight,
        crop_top=section.crop_top,
        sparsity_margin=section.sparsity_margin,
        ranks=ranks,
    )
    loss = (
        refinement.total
        + section.lambda_uni * register_uniformity
        + section.lambda_spu * absorption
    )
    return loss, {
        "refinement": refinement.total,
        "alignment": refinement.alignment,
        "uniformity": refinement.uniformity,
        "register_uniformity": register_uniformity,
        "absorption": absorption,
        "sparsity": sparsity,
    }


def choose_candidates(teacher: TeacherView, draws: StepDraws, *, share: float) -> Tensor:
    """Likely spurious crop tokens, [Q, 2R, C]."""
    uniform_2QR = draws.candidates_2BKR.flatten(1, 2).to(teacher.crop_QNC.device)
    picks = [
        sample_candidates(score_QN, uniform_QR, share=share)
        for score_QN, uniform_QR in zip(teacher.scores, uniform_2QR, strict=True)
    ]
    return teacher.crop_QNC.take_along_dim(torch.cat(picks, dim=1)[..., None], dim=1)
