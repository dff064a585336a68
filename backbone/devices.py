"""Which devices there are to compute on; one that cannot be used is an error that says why.

A GPU that PyTorch cannot reach must not end in work on the CPU: it would be slow, and nobody would
know why.
"""

import os
import re
from pathlib import Path

import torch

from backbone.errors import DeviceError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# In a container only if it was given a GPU; the driver's file is in all of them.
DEVICE_NODE = Path("/dev/nvidiactl")
# CUDA release notes, "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility", Linux x86-64.
_LOWEST_DRIVERS = {"12": "525.60.13", "13": "580.65.06"}


def find_devices(wanted: str) -> list[str]:
    """Names of the devices that `wanted` means.

    Args:
        wanted: cpu, cuda, cuda:N, several with commas, or auto: every CUDA device, or the CPU
            where the machine has no GPU or CUDA_VISIBLE_DEVICES hides it.

    Raises:
        DeviceError: a device that is not here, a GPU that this PyTorch was not built for, or a GPU
            that PyTorch cannot reach, also with `auto`.
    """
    if wanted == "cpu":
        return ["cpu"]
    num_present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_present and DEVICE_NODE.exists() and not _are_hidden():
        raise DeviceError(f"this machine has an NVIDIA GPU, but {_obstacle()}; or use --device cpu")
    if wanted == "auto":
        names = [f"cuda:{index}" for index in range(num_present)] or ["cpu"]
    else:
        names = wanted.split(",")
    for name in names:
        _check(name, num_present)
    return names


def _check(name: str, num_present: int) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no device is called {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"device {name} is not supported; use auto, cpu, cuda or cuda:N")
    index = device.index or 0
    if index >= num_present:
        raise DeviceError(
            f"device {name} is not here: {num_present} CUDA devices are visible; use cpu, auto, or "
            "one that is there. A container sees those that it was given (docker run --gpus all; "
            "nvidia.com/gpu in Kubernetes)"
        )
    major, minor = torch.cuda.get_device_capability(index)
    lowest = _lowest_capability()
    if (major, minor) < lowest:
        raise DeviceError(
            f"{name} is a {torch.cuda.get_device_name(index)} of compute capability "
            f"{major}.{minor}, and PyTorch {torch.__version__} was built for {lowest[0]}."
            f"{lowest[1]} and above; use a newer GPU, or --device cpu"
        )


def _are_hidden() -> bool:
    """Whether the GPUs were taken away on purpose, as Slurm does for jobs that asked for none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def _lowest_capability() -> tuple[int, int]:
    """The oldest GPUs that this PyTorch has device code for; (0, 0) when it does not say."""
    numbers = re.findall(r"\bsm_(\d+)(\d)\b", " ".join(torch.cuda.get_arch_list()))
    return min(((int(major), int(minor)) for major, minor in numbers), default=(0, 0))


def _obstacle() -> str:
    """Why PyTorch does not reach the GPU, as far as can be told, and what to do."""
    cuda = torch.version.cuda
    if cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA: install the build with CUDA"
    lowest = _LOWEST_DRIVERS.get(cuda.partition(".")[0])
    needed = f"{lowest} or newer" if lowest else "a newer one"
    found = _driver()
    cannot = f"PyTorch {torch.__version__} (CUDA {cuda}) cannot use it"
    if lowest and _numbers(found) >= _numbers(lowest):
        return (
            f"{cannot}, although driver {found} is new enough. See nvidia-smi on the host, the "
            "rights of /dev/nvidia*, and Fabric Manager on a host with NVSwitch"
        )
    return f"{cannot}: driver {found} found, {needed} needed. Update the driver of the host"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _driver() -> str:
    """Version of the kernel's driver."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found.group() if found else "of unknown version"
