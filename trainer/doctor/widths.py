"""Register borders of several widths at inference: what they leave of spurious tokens.

A wider border than in training is allowed. It usually takes up more of what is spurious, changes
the other tokens a little, and costs tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone import Backbone, DenseEncoder, RegisterBorder
from backbone.registers import LearnableBorder
from trainer.config import FpGpSection
from trainer.evaluate.spurious import SpuriousScores, Thresholds, spurious_scores, spurious_shares

WIDTHS = (0, 1, 2, 3, 4)


class WidthResult(NamedTuple):
    """Of one width, over all images.

    `fp_gp` is the share of tokens that still carry the spurious features of the images without
    border; `cosine` the mean cosine of a token with the same at the default width; `cost` the
    tokens computed per token of the image.
    """

    width: int
    fp_gp: float
    cosine: float
    cost: float


class _WidthEncoder(DenseEncoder):
    """An encoder whose default border has a given width."""

    default_width = 0

    def register_width(self, height: int, width: int, asked: int | None = None) -> int:
        return super().register_width(height, width, self.default_width if asked is None else asked)


def measure_widths(
    backbone: Backbone,
    border: RegisterBorder,
    images_I3SS: Tensor,
    reference_3SS: Tensor,
    section: FpGpSection,
    *,
    learned: LearnableBorder | None,
    channels: Sequence[int],
    strip_share: float,
    bf16: bool,
) -> list[WidthResult]:
    """Compare the widths of `WIDTHS` and the border's default, in ascending order.

    Args:
        backbone: Raw or refined. In bf16 its weights are converted in place.
        border: What the border is filled with, and its default width.
        images_I3SS: uint8.
        reference_3SS: The reference image, uint8.
        section: Its criterion and threshold say what is spurious.
        learned: Patches of a learned border.
        channels: Masked channels.
        strip_share: See `spurious_scores`.
        bf16: Run the backbone in bfloat16.
    """

    def encoder_of(width: int) -> _WidthEncoder:
        encoder = _WidthEncoder(
            backbone,
            digest="",
            learned_border=learned,
            device=next(backbone.parameters()).device,
            precision="bf16" if bf16 else "fp32",
        )
        encoder.border, encoder.default_width = border, width
        return encoder

    def score(width: int) -> SpuriousScores:
        return spurious_scores(
            encoder_of(width),
            images_I3SS,
            reference_3SS,
            against=plain,
            channels=channels,
            strip_share=strip_share,
        )

    size = images_I3SS.shape[-1]
    grid = backbone.grid(size, size)
    default = border.width(grid)
    widths = sorted({*WIDTHS, default})
    plain = encoder_of(0)
    scores = {width: score(width) for width in widths}
    thresholds = Thresholds(section.threshold, section.threshold)
    if section.criterion == "zscore":
        thresholds = Thresholds.of_scores(scores[0], section.threshold)
    index = torch.tensor(list(channels), dtype=torch.int64)
    usual = _unit_tokens(encoder_of(default), images_I3SS, index)
    results = []
    for width in widths:
        encoder = encoder_of(width)
        cosines = F.cosine_similarity(_unit_tokens(encoder, images_I3SS, index), usual, dim=-1)
        results.append(
            WidthResult(
                width,
                fp_gp=spurious_shares(scores[width], thresholds).fp_gp,
                cosine=float(cosines.mean()),
                cost=encoder.num_tokens(size, size) / (grid[0] * grid[1]),
            )
        )
    return results


def _unit_tokens(encoder: DenseEncoder, images_I3SS: Tensor, channels: Tensor) -> Tensor:
    tokens = [encoder.encode(image[None])[0].tokens.float().cpu() for image in images_I3SS]
    return F.normalize(torch.cat(tokens).index_fill(-1, channels, 0), dim=-1)
