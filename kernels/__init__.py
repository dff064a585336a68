"""The operations of the method that are worth a kernel, each with its plain PyTorch definition.

Every operation is a function of tensors and knows nothing of backbones or training. It computes
in float32 at least whatever it is given, autocast included; attention alone multiplies 16-bit
inputs as they are and sums in float32, as SDPA does.
"""

from kernels.attention import AttentionOutput, attention, attention_with_lse, sdpa_in_order
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
    "sdpa_in_order",
    "widen",
]
