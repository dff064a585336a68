"""The one place that decides whether an operation runs its Triton kernel or its reference.

`REFINERY_KERNELS` says what is wanted: `auto` (default) takes the kernel on a CUDA device that
supports it and the reference elsewhere; `reference` always takes the reference; `triton` always
takes the kernel, and what it cannot do is an error. Each decision is logged once. (The backward
pass of attention has no kernel: it is PyTorch's in every mode.)
"""

import contextlib
import functools
import logging
import os
from typing import Literal, cast, get_args

import torch
import triton
from torch import Tensor

logger = logging.getLogger(__name__)

Mode = Literal["auto", "triton", "reference"]
MODE_VARIABLE = "REFINERY_KERNELS"
_MIN_CAPABILITY = (8, 0)  # bfloat16 matrix units and asynchronous copies
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_logged: set[tuple[str, str, str]] = set()


class KernelError(RuntimeError):
    """What `REFINERY_KERNELS` asks for cannot be had."""


class KernelModeError(KernelError):
    """`REFINERY_KERNELS` says something that it must not."""


class KernelUnavailableError(KernelError):
    """`REFINERY_KERNELS=triton` asks for a kernel that cannot run on what it was given."""


@functools.cache
def mode() -> Mode:
    """What `REFINERY_KERNELS` says, read once a process.

    Raises:
        KernelModeError: it says something else.
    """
    asked = os.environ.get(MODE_VARIABLE, "auto")
    if asked not in get_args(Mode):
        raise KernelModeError(
            f"{MODE_VARIABLE} is {asked!r}; use one of {', '.join(get_args(Mode))}"
        )
    return cast(Mode, asked)


def use_triton(
    operation: str, tensor: Tensor, *, unsupported: str | None = None, slower: str | None = None
) -> bool:
    """Whether `operation` runs its kernel on a tensor.

    Call it inside the custom op, where `torch.compile` does not look.

    Args:
        operation: Name of the operation, for the log.
        tensor: Any of its tensors; its device counts.
        unsupported: Why the kernel cannot do what is asked, if it cannot.
        slower: Why the reference is the better choice, if it is: `auto` takes it.

    Raises:
        KernelUnavailableError: the kernel was asked for explicitly and cannot run.
    """
    asked = mode()
    if asked == "reference":
        _log_once(operation, "reference", f"{MODE_VARIABLE}=reference")
        return False
    obstacle = _obstacle(tensor.device, asked) or unsupported
    if obstacle is None and not (slower and asked == "auto"):
        _log_once(operation, "triton", f"{MODE_VARIABLE}={asked}, {tensor.device.type}")
        return True
    if asked == "triton":
        raise KernelUnavailableError(
            f"{MODE_VARIABLE}=triton, but {operation} cannot run its kernel: {obstacle}; "
            f"set {MODE_VARIABLE}=auto, and PyTorch does it"
        )
    # On a GPU one expects the kernel: that it cannot run deserves more than a line in the log.
    level = logging.WARNING if obstacle and tensor.device.type == "cuda" else logging.INFO
    _log_once(operation, "reference", obstacle or str(slower), level)
    return False


def check_mode(device: torch.device) -> None:
    """Refuse at once what `use_triton` would refuse later, whatever the operation is.

    Raises:
        KernelError: `REFINERY_KERNELS` is mistyped, or asks for kernels that `device` cannot run.
    """
    if mode() == "triton" and (obstacle := _obstacle(device, "triton")):
        raise KernelUnavailableError(
            f"{MODE_VARIABLE}=triton, but no kernel can run: {obstacle}; "
            f"set {MODE_VARIABLE}=auto, and PyTorch does it"
        )


def unsupported_dtype(*dtypes: torch.dtype) -> str | None:
    """Why no kernel computes in these number formats, or None where all can."""
    return next(
        (f"no kernel computes in {dtype}" for dtype in dtypes if dtype not in _DTYPES), None
    )


def unsupported_span(*tensors: Tensor) -> str | None:
    """Why kernels cannot address these tensors, or None where they can.

    They count a token's channels in 32 bits, which channels that lie far apart exceed.
    """
    if any(tensor.shape[-1] * tensor.stride(-1) >= 2**31 for tensor in tensors):
        return "the channels of a token span 2**31 elements or more"
    return None


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `tensor` the current one: Triton launches on the current device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _obstacle(device: torch.device, asked: Mode) -> str | None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _MIN_CAPABILITY:
            return None
        return f"{device} has compute capability {capability}, {_MIN_CAPABILITY} is needed"
    if device.type == "cpu" and asked == "triton" and triton.knobs.runtime.interpret:
        return None
    return f"the tensors are on {device.type}, not on a CUDA device"


def _log_once(operation: str, backend: str, reason: str, level: int = logging.INFO) -> None:
    entry = (operation, backend, reason)
    if entry not in _logged:
        _logged.add(entry)
        logger.log(level, "%s runs on its %s (%s)", operation, _KINDS[backend], reason)


_KINDS = {"triton": "Triton kernel", "reference": "PyTorch reference"}
