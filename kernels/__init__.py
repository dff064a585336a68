"""The operations of the method that are worth a kernel, each with its plain PyTorch definition.

Every operation is a pure function of tensors, computes in float32 at least whatever it is given
(autocast included), and knows nothing of backbones or training.
"""

from kernels.attention import AttentionOutput, attention, attention_with_lse
from kernels.attention_flow import Flow, attention_inflow
from kernels.contrastive import mean_logsumexp
from kernels.precision import full_precision, widen
from kernels.roi_align import axis_weights, roi_align
from kernels.similarity import BestMatch, max_similarity
from kernels.window import TokenWindow

__all__ = [
    "AttentionOutput",
    "BestMatch",
    "Flow",
    "TokenWindow",
    "attention",
    "attention_inflow",
    "attention_with_lse",
    "axis_weights",
    "full_precision",
    "max_similarity",
    "mean_logsumexp",
    "roi_align",
    "widen",
]
