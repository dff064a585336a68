"""How exact a kernel must be: at most twice the error of PyTorch in the same number format."""

import torch
from torch import Tensor


def assert_as_exact(result: Tensor, same_format: Tensor, exact: Tensor, *, floor: float) -> None:
    """The largest error of `result` is at most twice that of PyTorch's own computation.

    Independent of shape and scale, unlike a fixed tolerance.

    Args:
        result: Of the kernel.
        same_format: The same computation by PyTorch in the number format of the kernel's input.
        exact: The same in float64, from the same rounded input.
        floor: Error that is always allowed, for computations that PyTorch happens to do exactly.
    """
    assert result.shape == exact.shape
    assert bool(torch.isfinite(result).all()), "the kernel left values that are not finite"
    error = (result.double() - exact).abs().max().item() if result.numel() else 0.0
    allowed = (same_format.double() - exact).abs().max().item() if result.numel() else 0.0
    assert error <= 2 * allowed + floor, f"error {error:.3g}, PyTorch's is {allowed:.3g}"
