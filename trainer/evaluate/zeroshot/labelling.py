"""From cosines of patches and class names to a class for every pixel.

Dimension key: h, w = token grid, Q = names, H, W = pixels of the label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.evaluate.zeroshot.vocabulary import Vocabulary

# Values of one strip of the upsampled logits: 128 MiB of float32.
_STRIP_VALUES = 2**25


def label_map(
    cosines_hwQ: Tensor,
    vocabulary: Vocabulary,
    size: tuple[int, int],
    *,
    scale: float,
    threshold: float | None = None,
    strip_values: int = _STRIP_VALUES,
) -> Tensor:
    """The best class of every pixel, int64 `[H, W]`.

    Logits (cosine times scale) are upsampled bilinearly; the class is that of the name with the
    largest one. With a threshold, pixels whose best name has a smaller softmax probability among
    all names are background, as in TCL (arXiv:2212.00785) and SCLIP (arXiv:2312.01597).

    Args:
        cosines_hwQ: Of every patch with every name of the vocabulary.
        vocabulary: Which class each name is of.
        size: (H, W) of the label.
        scale: Inverse temperature of the softmax; decides nothing without a threshold.
        threshold: Probability; needs a vocabulary with a background.
        strip_values: Upsampled values that are held at once.
    """
    height, width = size
    class_of_Q = torch.tensor(vocabulary.classes, device=cosines_hwQ.device)
    logits_1Qhw = (cosines_hwQ.float() * scale).permute(2, 0, 1)[None]
    grid_h, num_names = logits_1Qhw.shape[2], logits_1Qhw.shape[1]
    # Bilinear is separable: columns at once, rows strip by strip, so that large labels with many
    # classes do not need gigabytes.
    wide_QhW = F.interpolate(logits_1Qhw, (grid_h, width), mode="bilinear", align_corners=False)[0]
    rows = max(1, strip_values // (num_names * width))
    strips = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        upper, lower, weight = _rows(start, stop, height, grid_h, wide_QhW.device)
        strip_QHW = torch.lerp(wide_QhW[:, upper], wide_QhW[:, lower], weight[None, :, None])
        best_HW, name_HW = strip_QHW.max(dim=0)
        found_HW = class_of_Q[name_HW]
        if threshold is not None:
            assert vocabulary.background is not None  # there is nothing else to fall back to
            probability_HW = (best_HW - strip_QHW.logsumexp(dim=0)).exp()
            found_HW = torch.where(probability_HW < threshold, vocabulary.background, found_HW)
        strips.append(found_HW)
    return torch.cat(strips)


def _rows(
    start: int, stop: int, height: int, grid_h: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Grid rows above and below of pixel rows, and how far they are towards the one below."""
    pixels = torch.arange(start, stop, device=device, dtype=torch.float32)
    position = ((pixels + 0.5) * (grid_h / height) - 0.5).clamp(0, grid_h - 1)
    upper = position.floor().long()
    lower = (upper + 1).clamp(max=grid_h - 1)
    return upper, lower, position - upper
