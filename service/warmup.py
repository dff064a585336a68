"""First forwards of a model, before the service calls itself ready.

They pay for lazy initialisation and the compilation of kernels, prove that the model runs, and
measure how much an image's features depend on the company it is encoded in.

Dimension key: B = images, N = patch tokens, C = channels, h, w = image in pixels.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backbone import DenseEncoder, DenseFeatures
from service.boxes import Regions, align

logger = logging.getLogger(__name__)

_BATCH = 4
# Largest relative error of a token (distance over length) between an image alone and the same
# image in a batch: matrix products of other shapes add up in another order. Set above what was
# measured, see docs/performance.md.
_MAX_RELATIVE_ERROR = {"fp32": 1e-3, "bf16": 5e-2}


class WarmUp(NamedTuple):
    """What the warm-up found."""

    tokens_per_second: float  # of one device
    max_relative_error: float  # the bound that is promised
    measured_relative_error: float
    measured_cosine: float

    @property
    def min_cosine(self) -> float:
        """What the bound on the relative error means for the cosine."""
        return math.sqrt(1.0 - self.max_relative_error**2)


def warm_up(
    encoder: DenseEncoder, buckets: Sequence[tuple[int, int]], *, max_tokens: int
) -> WarmUp:
    """Encode images of every bucket, alone and together, as many as `max_tokens` allow.

    Args:
        encoder: What is warmed up.
        buckets: (h, w) in pixels; the first is the one that is measured.
        max_tokens: Most tokens of a batch.

    Raises:
        RuntimeError: the model gives values that are not finite.
    """
    started = time.perf_counter()
    for size in buckets[1:]:
        encoder.encode(_noise(encoder, size, max_tokens))
        encoder.encode(_noise(encoder, size, 1))
    images_B3hw = _noise(encoder, buckets[0], max_tokens)
    (together,) = encoder.encode(images_B3hw)
    _warm_up_boxes(together)
    together_BNC = together.tokens.float().cpu()
    encoded = time.perf_counter()
    encoder.encode(images_B3hw)[0].tokens.cpu()
    rate = len(images_B3hw) * encoder.num_tokens(*buckets[0]) / (time.perf_counter() - encoded)
    alone_BNC = torch.cat(
        [encoder.encode(image[None])[0].tokens.float().cpu() for image in images_B3hw]
    )
    if not bool(torch.isfinite(alone_BNC).all()):
        raise RuntimeError(
            "the model gives values that are not finite; try --precision fp32, or check its weights"
        )
    error, cosine = _difference(together_BNC, alone_BNC)
    bound = _MAX_RELATIVE_ERROR[encoder.precision]
    if error > bound:
        logger.warning(
            "features depend on their batch: relative error %.2g, more than the %.2g that /info "
            "promises",
            error,
            bound,
        )
    logger.info(
        "warmed up %d buckets in %.1f s: %.0f tokens/s, relative error alone or in a batch %.2g",
        len(buckets),
        time.perf_counter() - started,
        rate,
        error,
    )
    return WarmUp(rate, bound, error, cosine)


def _noise(encoder: DenseEncoder, size: tuple[int, int], max_tokens: int) -> torch.Tensor:
    """uint8 [B, 3, h, w] of a few images, one at least."""
    batch = max(1, min(_BATCH, max_tokens // encoder.num_tokens(*size)))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)


def _warm_up_boxes(features: DenseFeatures) -> None:
    whole_14 = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    batch = features.tokens.shape[0]
    for box_size in (1, 7):
        for normalize in (False, True):
            align(features, [Regions(whole_14, box_size, normalize)] * batch)


def _difference(left_BNC: Tensor, right_BNC: Tensor) -> tuple[float, float]:
    """Largest relative error and smallest cosine over all tokens."""
    error_BN = (left_BNC - right_BNC).norm(dim=-1) / right_BNC.norm(dim=-1)
    cosine_BN = torch.nn.functional.cosine_similarity(left_BNC, right_BNC, dim=-1)
    return float(error_BN.max()), float(cosine_BN.min())
