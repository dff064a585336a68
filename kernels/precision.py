"""The precision every operation of this package computes in: float32 at least, autocast or not."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 when it came in 16 bits; float32 and float64 pass unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def full_precision(
    function: Callable[Concatenate[Tensor, Arguments], Result],
) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """Switch autocast off inside `function`, on the device of its first argument.

    Widening the inputs is not enough: under `torch.autocast` a matrix product of two float32
    tensors still runs in 16 bits. Call `backward` outside autocast, as PyTorch asks anyway.
    """

    @wraps(function)
    def in_full_precision(
        tensor: Tensor, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return in_full_precision
