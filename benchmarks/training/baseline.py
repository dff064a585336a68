"""The step as one would write it down from the method: two models, whole matrices, autograd.

Nothing of `kernels/` and none of the trainer's own losses and filters is used: library calls alone.
The images, the crops and every other draw are those of `trainer.refiner`, and so is the loss, which
the benchmark checks.

Dimension key: B = images, K = crops of an image, Q = B * K crops, N = tokens of an image or crop,
S = tokens of the reference or its strip, R = registers, D = detectors, P = candidates of a crop,
C = channels.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from backbone import Backbone
from backbone.preprocess import normalize
from backbone.registers import strip, surround
from trainer.config import Recipe
from trainer.crops import compose
from trainer.draws import StepDraws
from trainer.lora import linear_names


class Baseline(nn.Module):
    """Teacher and student as two models; the arguments are those of `trainer.refiner.Refiner`."""

    def __init__(
        self, backbone: Backbone, recipe: Recipe, *, size: int, width: int, reference_3SS: Tensor
    ) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(backbone).eval().requires_grad_(False)
        self.student = backbone.eval().requires_grad_(False)
        lora = recipe.lora
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=lora.dropout,
            target_modules=linear_names(backbone.vit),
            bias="none",
        )
        self._model = get_peft_model(backbone.vit, config)
        self.recipe, self.size, self.width = recipe, size, width
        self.grid = backbone.grid(size, size)
        reference = normalize(reference_3SS[None], mean=backbone.mean, std=backbone.std)
        self.register_buffer("reference_13SS", reference, persistent=False)
        self.reference_13SS: Tensor
        self._reference_1SC: Tensor | None = None
        self.bf16 = False

    def train(self, mode: bool = True) -> "Baseline":
        """Switch the adapter's dropout alone."""
        super().train(False)
        for name, module in self._model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def forward(self, images_B3SS: Tensor, draws: StepDraws) -> Tensor:
        """The loss of a batch."""
        pixels_B3SS = normalize(images_B3SS, mean=self.student.mean, std=self.student.std)
        boxes_BK4 = draws.boxes_BK4.to(pixels_B3SS.device)
        views_Q3SS = _crop(pixels_B3SS, boxes_BK4, (self.size, self.size))
        torch.manual_seed(draws.dropout_seed)
        image_BNC, registers_BRC = self._surrounded(pixels_B3SS, draws.border, self.width)
        maps_BCHW = image_BNC.mT.reshape(len(image_BNC), -1, *self.grid)
        crop_QNC = _unit(_crop(maps_BCHW, boxes_BK4, self.grid).flatten(2).mT)
        relations_QNC = None
        if draws.with_consistency:
            wide = max(self.width, self.recipe.loss.consistency_width)
            with torch.no_grad():
                relations_QNC, _ = self._surrounded(views_Q3SS, draws.consistency_border, wide)

        with torch.no_grad():
            composite = compose(
                views_Q3SS,
                self.reference_13SS,
                side=draws.side,
                share=self.recipe.crops.strip_share,
                patch_size=self.teacher.patch_size,
            )
            with self._projections() as taps:
                tokens_QTC = self._teach(composite.pixels)
            teacher_QNC = tokens_QTC[:, composite.is_crop]
            strip_QSC = tokens_QTC[:, ~composite.is_crop]
            full_BNC = self._teach(pixels_B3SS)
            if self._reference_1SC is None:
                self._reference_1SC = self._teach(self.reference_13SS)
            full_QNC = full_BNC.repeat_interleave(boxes_BK4.shape[1], dim=0)
            scores = [
                (teacher_QNC @ other.mT).amax(dim=-1) for other in (self._reference_1SC, strip_QSC)
            ]
            targets_QNC = teacher_QNC
            if self.recipe.loss.matched:
                targets_QNC = _nearest(teacher_QNC, full_QNC)
            registers_QRC = registers_BRC.repeat_interleave(boxes_BK4.shape[1], dim=0)
            clean_QN = self._clean(scores, targets_QNC, registers_QRC, draws, taps, composite)
        return self._loss(
            image_BNC,
            registers_BRC,
            crop_QNC,
            teacher_QNC,
            full_QNC,
            targets_QNC,
            clean_QN,
            scores,
            relations_QNC,
            draws,
        )

    def _clean(
        self,
        scores: list[Tensor],
        targets_QNC: Tensor,
        registers_QRC: Tensor,
        draws: StepDraws,
        taps: dict[int, dict[str, Tensor]],
        composite: Any,
    ) -> Tensor:
        filters = self.recipe.filters
        clean_QN = torch.ones_like(scores[0], dtype=torch.bool)
        if filters.fp_gp.enabled:
            for score_QN in scores:
                level: Any = filters.fp_gp.threshold
                if filters.fp_gp.criterion == "zscore":
                    spread = score_QN.std(dim=-1, keepdim=True)
                    level = score_QN.mean(dim=-1, keepdim=True) + level * spread
                clean_QN = clean_QN & (score_QN < level)
        if filters.register_guided.enabled:
            detectors_BD = draws.detectors_BD.to(targets_QNC.device)
            per_image = len(targets_QNC) // len(detectors_BD)
            index_QD1 = detectors_BD.repeat_interleave(per_image, dim=0)[..., None]
            detectors_QDC = registers_QRC.take_along_dim(index_QD1, dim=1)
            likeness_QN = (targets_QNC @ detectors_QDC.mT).amax(dim=-1)
            clean_QN = clean_QN & (likeness_QN < filters.register_guided.threshold)
        if filters.attention_hijack.enabled:
            inflow_QN = self._inflow(taps, composite.is_crop, clean_QN)
            kept_n = inflow_QN[clean_QN]
            if len(kept_n) > 1:
                level = kept_n.mean() + filters.attention_hijack.threshold * kept_n.std()
                clean_QN = clean_QN & (inflow_QN > level)
        return clean_QN if clean_QN.any() else torch.ones_like(clean_QN)

    def _inflow(
        self, taps: dict[int, dict[str, Tensor]], is_crop: Tensor, clean_QN: Tensor
    ) -> Tensor:
        variant = self.recipe.filters.attention_hijack.variant
        maps = []
        for tapped in taps.values():
            q, k = (
                tapped[name][:, :, self.teacher.num_prefix_tokens :][:, :, is_crop].float()
                for name in ("q_norm", "k_norm")
            )
            if variant == "paper":
                score = q @ k.mT * q.shape[-1] ** -0.5
                score = score.masked_fill(~clean_QN[:, None, None], torch.finfo(score.dtype).min)
                maps.append(score.softmax(dim=-1).mean(dim=1))
            else:
                q, k = (F.normalize(x.transpose(1, 2).flatten(2), dim=-1) for x in (q, k))
                maps.append((q @ k.masked_fill(~clean_QN[..., None], 0).mT).softmax(dim=-1))
        return torch.stack(maps).mean(dim=0).sum(dim=1)

    def _loss(
        self,
        image_BNC: Tensor,
        registers_BRC: Tensor,
        crop_QNC: Tensor,
        teacher_QNC: Tensor,
        full_QNC: Tensor,
        targets_QNC: Tensor,
        clean_QN: Tensor,
        scores: list[Tensor],
        relations_QNC: Tensor | None,
        draws: StepDraws,
    ) -> Tensor:
        section = self.recipe.loss
        t = section.temperature
        clean_nC = targets_QNC[clean_QN]
        sparsity = (clean_nC * clean_nC.flip(0)).sum(dim=-1).mean()
        pool_QNC = full_QNC if section.matched else teacher_QNC
        cosine_QN = (crop_QNC * targets_QNC).sum(dim=-1)
        a_QNN = _floored(crop_QNC @ pool_QNC.mT, sparsity)
        spread_QN = (a_QNN / t).logsumexp(dim=-1)
        refinement = (-cosine_QN / t + section.uniformity * spread_QN)[clean_QN].mean()

        b_BNR = _floored(image_BNC @ registers_BRC.mT, section.affinity_floor)
        uniformity = (b_BNR / t).logsumexp(dim=-1).mean()

        share = self.recipe.filters.fp_gp.candidate_share
        eligible = max(1, int(share * scores[0].shape[-1]))
        picks = []
        for score_QN, uniform_BKR in zip(scores, draws.candidates_2BKR, strict=True):
            best_Qn = score_QN.topk(eligible, dim=-1).indices
            pick_QR = (uniform_BKR.flatten(0, 1).to(best_Qn.device) * eligible).long()
            picks.append(best_Qn.gather(1, pick_QR.clamp(max=eligible - 1)))
        candidates_QPC = teacher_QNC.take_along_dim(torch.cat(picks, dim=1)[..., None], dim=1)
        candidates_QPC = _nearest(candidates_QPC, full_QNC)
        registers_QRC = registers_BRC.repeat_interleave(len(crop_QNC) // len(image_BNC), dim=0)
        absorbed_QRC = _nearest(registers_QRC.detach(), candidates_QPC)
        attraction = (registers_QRC * absorbed_QRC).sum(dim=-1).mean()
        likeness_QR = (registers_QRC @ crop_QNC.detach().mT).amax(dim=-1)
        num_top = math.ceil(section.crop_top * likeness_QR.shape[-1])
        top_Qr = likeness_QR.topk(num_top, dim=-1).values
        close_n = top_Qr[top_Qr > sparsity]
        pull = close_n.mean() if len(close_n) else top_Qr.new_zeros(())
        c_QRR = registers_QRC @ absorbed_QRC.mT
        c_QRR = torch.where(c_QRR < sparsity, sparsity + section.sparsity_margin, c_QRR)
        repulsion = (c_QRR / t).logsumexp(dim=-1).mean()
        absorption = -(attraction + section.crop_weight * pull) / t + repulsion

        loss = refinement + section.lambda_uni * uniformity + section.lambda_spu * absorption
        if relations_QNC is not None:
            rows_QNN = _scaled(crop_QNC @ crop_QNC.detach().mT) / t
            wanted_QNN = _scaled(relations_QNC @ relations_QNC.mT) / t
            cross = -(wanted_QNN.softmax(dim=-1) * rows_QNN.log_softmax(dim=-1)).sum(dim=-1)
            loss = loss + section.lambda_con * cross.mean()
        total: Tensor = loss
        return total

    def _surrounded(
        self, pixels_X3SS: Tensor, border: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor]:
        assert border is not None
        patch = self.student.patch_size
        canvas = surround(pixels_X3SS, border.to(pixels_X3SS.device), width=width, patch_size=patch)
        with torch.autocast(canvas.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            tokens = self.student.encode(canvas).tokens
        image, registers = strip(tokens, self.grid, width)
        return _unit(image), _unit(registers)

    def _teach(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return _unit(self.teacher.encode(pixels).tokens)

    @contextlib.contextmanager
    def _projections(self) -> Iterator[dict[int, dict[str, Tensor]]]:
        """Queries and keys of the layers in the filter's range, all of them at once."""
        hijack = self.recipe.filters.attention_hijack
        layers = hijack.layer_range(self.teacher.depth) if hijack.enabled else range(0)
        taps: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
        handles = []
        for layer in layers:
            for name in ("q_norm", "k_norm"):
                module = getattr(list(self.teacher.vit.blocks)[layer].attn, name)

                def keep(
                    _module: nn.Module, _inputs: Any, output: Tensor, at: Any = (layer, name)
                ) -> None:
                    taps[at[0]][at[1]] = output

                handles.append(module.register_forward_hook(keep))
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()


def _crop(maps_BCHW: Tensor, boxes_BK4: Tensor, output: tuple[int, int]) -> Tensor:
    height, width = maps_BCHW.shape[-2:]
    scale = boxes_BK4.new_tensor([width, height, width, height])
    boxes = list(boxes_BK4 * scale)
    crops: Tensor = roi_align(maps_BCHW.float(), boxes, output, aligned=True)
    return crops


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.float(), dim=-1)


def _nearest(tokens_QNC: Tensor, others_QMC: Tensor) -> Tensor:
    best_QN = (tokens_QNC @ others_QMC.mT).argmax(dim=-1)
    return others_QMC.take_along_dim(best_QN[..., None], dim=1)


def _floored(similarity: Tensor, level: float | Tensor) -> Tensor:
    """Similarities below a level pass no gradient."""
    return torch.where(similarity < level, similarity.detach(), similarity)


def _scaled(logits_QNN: Tensor) -> Tensor:
    low = logits_QNN.amin(dim=-1, keepdim=True)
    return (logits_QNN - low) / (logits_QNN.amax(dim=-1, keepdim=True) - low).clamp(min=1e-6)
