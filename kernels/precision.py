"""The precision every operation of this package computes in: float32 at least, autocast or not."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

# A vector shorter than that has no direction, as in torch.nn.functional.normalize.
SHORTEST_NORM = 1e-12

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 when it came in 16 bits; float32 and float64 pass unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The number format that results of these tensors are computed in: float32 at least."""
    return functools.reduce(
        torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32
    )


def check_alike(**tensors: Tensor) -> None:
    """Refuse tensors that are not of floating point, or lie on different devices.

    Raises:
        ValueError: naming them.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} are {tensor.dtype}; floating point numbers are wanted")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{places}: all must be on one device")


def full_precision(
    function: Callable[Concatenate[Tensor, Arguments], Result],
) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """Switch autocast off inside `function`, on the device of its first argument.

    Widening the inputs is not enough: under `torch.autocast` a matrix product of two float32
    tensors still runs in 16 bits. Call `backward` outside autocast, as PyTorch asks anyway.
    """

    @functools.wraps(function)
    def in_full_precision(
        tensor: Tensor, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return in_full_precision
