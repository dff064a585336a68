"""Every random choice of a training step, as one value that a step can be replayed from.

A batch that several processes share has one set of draws: each of them draws all and takes its
part, so that their number changes nothing. Border noise, which is a hundred times the rest, has a
generator for every image instead, and is drawn for the own images alone.

Dimension key: B = images, K = crops of an image, R = registers, D = detectors.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from backbone.registers import Fill, NoiseFill, draw_border
from trainer.config import CropsSection
from trainer.crops import Side, sample_boxes

ALL = slice(None)
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class StepDraws:
    """Every random choice of a step, for all its images or a part of them; all tensors on the CPU.

    Attributes:
        boxes_BK4: Crops, normalised xyxy.
        side: Side of the composites that shows the reference image.
        candidates_2BKR: Uniform numbers that choose the candidates for absorption, for the
            comparison with the reference image and for that with the strip.
        detectors_BD: Register tokens that are detectors.
        border: Pixels of the register border of every image; None where it is learned.
        consistency_border: The same for the consistency target's crops.
        dropout_seed: Seeds the adapter's dropout: parts that are computed apart have one each.
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
    size: int,
    margin: int,
    consistency_margin: int | None,
    part: slice = ALL,
) -> StepDraws:
    """Draw the choices of a step, or those of some of its images.

    Args:
        batch: Images in the step.
        generator: Of the CPU. What is left of it does not depend on `part`.
        crops: Settings of the proposals.
        fill: Of the register border.
        detector_share: Share of an image's registers that are detectors; at least one is.
        num_registers: Register tokens of an image, R.
        size: Side of an image in pixels.
        margin: Width of the border in pixels.
        consistency_margin: The same around the consistency target's crops; None before it starts.
        part: The images whose draws are returned: all, or a range.
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
    border_seeds = torch.randint(2**62, (batch,), generator=generator)[part].tolist()
    first, _, _ = part.indices(batch)
    dropout_seed = int(torch.randint(2**62, (), generator=generator)) + first
    border = consistency_border = None
    if fill != "learnable":
        noise = [torch.Generator().manual_seed(seed) for seed in border_seeds]
        border = _draw_rims(fill, size, margin, 1, noise)
        if consistency_margin is not None:
            consistency_border = _draw_rims(fill, size, consistency_margin, num_crops, noise)
    return StepDraws(
        boxes_BK4=boxes[part],
        side=side,
        candidates_2BKR=candidates[:, part],
        detectors_BD=order[part, :num_detectors].contiguous(),
        border=border,
        consistency_border=consistency_border,
        dropout_seed=dropout_seed,
        with_consistency=consistency_margin is not None,
    )


def _draw_rims(
    fill: NoiseFill, size: int, margin: int, count: int, generators: list[torch.Generator]
) -> Tensor:
    """`count` borders by every generator, [borders, 3, size + 2 margin, size + 2 margin].

    What the images will cover is left at zero: it would be nine tenths of the noise to draw.
    """
    side = size + 2 * margin
    borders = torch.zeros(len(generators) * count, 3, side, side)
    inside = slice(margin, margin + size)
    for own, generator in zip(torch.split(borders, count), generators, strict=True):
        for rows, columns in (
            (slice(0, margin), slice(None)),
            (slice(margin + size, side), slice(None)),
            (inside, slice(0, margin)),
            (inside, slice(margin + size, side)),
        ):
            rim = own[:, :, rows, columns]
            height, width = rim.shape[2:]
            rim.copy_(draw_border(fill, (height, width), generator=generator, batch=count))
    return borders
