"""Every random choice of a training step, as one value that a step can be replayed from.

Dimension key: B = images, K = crops of an image, R = registers, D = detectors.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from backbone.registers import Fill, draw_border
from trainer.config import CropsSection
from trainer.crops import Side, sample_boxes

SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class StepDraws:
    """Every random choice of a step; all tensors on the CPU.

    Attributes:
        boxes_BK4: Crops, normalised xyxy.
        side: Side of the composites that shows the reference image.
        candidates_2BKR: Uniform numbers that choose the candidates for absorption, for the
            comparison with the reference image and for that with the strip.
        detectors_BD: Register tokens that are detectors.
        border: Pixels of the register border of every image; None where it is learned.
        consistency_border: The same for the consistency target's crops.
        dropout_seed: Seeds the adapter's dropout.
        with_consistency: Whether spatial consistency has started.
    """

    boxes_BK4: Tensor
    side: Side
    candidates_2BKR: Tensor
    detectors_BD: Tensor
    border: Tensor | None
    consistency_border: Tensor | None
    dropout_seed: int
    with_consistency: bool


def draw_step(
    batch: int,
    generator: torch.Generator,
    *,
    crops: CropsSection,
    fill: Fill,
    detector_share: float,
    num_registers: int,
    canvas: tuple[int, int],
    consistency_canvas: tuple[int, int] | None,
) -> StepDraws:
    """Draw the choices of a step.

    Args:
        batch: Images in it, B.
        generator: Of the CPU.
        crops: Settings of the proposals.
        fill: Of the register border.
        detector_share: Share of an image's registers that are detectors; at least one is.
        num_registers: Register tokens of an image, R.
        canvas: (Hc, Wc) in pixels of an image with its border.
        consistency_canvas: The same for the consistency target's crops; None before it starts.
    """
    num_crops = crops.num_crops
    boxes = sample_boxes(
        batch, num_crops, area=crops.area, aspect=crops.aspect, generator=generator
    )
    side = SIDES[int(torch.randint(len(SIDES), (), generator=generator))]
    candidates = torch.rand(2, batch, num_crops, num_registers, generator=generator)
    order = torch.rand(batch, num_registers, generator=generator).argsort(dim=-1)
    # The addend: a third of 132 must be 44 whatever the rounding of 1/3.
    num_detectors = max(1, int(detector_share * num_registers + 1e-6))
    border = consistency_border = None
    if fill != "learnable":
        border = draw_border(fill, canvas, generator=generator, batch=batch)
        if consistency_canvas is not None:
            consistency_border = draw_border(
                fill, consistency_canvas, generator=generator, batch=batch * num_crops
            )
    return StepDraws(
        boxes_BK4=boxes,
        side=side,
        candidates_2BKR=candidates,
        detectors_BD=order[:, :num_detectors].contiguous(),
        border=border,
        consistency_border=consistency_border,
        dropout_seed=int(torch.randint(2**62, (), generator=generator)),
        with_consistency=consistency_canvas is not None,
    )
