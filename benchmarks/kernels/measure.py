"""Time, memory and ceilings: do_bench on a GPU, processor time of alternating runs on a CPU."""

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_QUANTILES = (0.5, 0.2, 0.8)

Contender = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds of a call: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float


class Ceilings(NamedTuple):
    """The most that this device was seen to do: a large copy, a large matrix product."""

    copy_gb_per_second: float
    matmul_tflops: float


def time_all(contenders: Mapping[str, Contender], device: torch.device) -> dict[str, Timing]:
    """Time of each contender on the same inputs."""
    if device.type == "cuda":
        import triton.testing  # asks for a driver

        return {
            name: Timing(*triton.testing.do_bench(run, quantiles=_QUANTILES))
            for name, run in contenders.items()
        }
    return _alternate(contenders)


def _alternate(
    contenders: Mapping[str, Contender], *, min_rounds: int = 5, budget_seconds: float = 4.0
) -> dict[str, Timing]:
    """Processor time, in rounds of all contenders in turn.

    On a machine that others use too, the clock on the wall measures them; with one thread the
    processor time does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    started = time.process_time()
    rounds = 0
    while rounds < min_rounds or time.process_time() - started < budget_seconds:
        for name, run in contenders.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
        rounds += 1
    return {name: _quantiles(values) for name, values in seconds.items()}


def _quantiles(seconds: list[float]) -> Timing:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(statistics.median(seconds) * 1e3, low=tenths[1] * 1e3, high=tenths[7] * 1e3)


def peak_mib(run: Contender, device: torch.device) -> float:
    """Most memory that a call holds beyond what was there before it, results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    # The kernel's own high-water mark of the process, set back to what it holds now.
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0, _resident_kib("VmHWM") - before) / 1024


def return_memory_at_once() -> None:
    """Give freed tensors back to the system (CPU), so that resident memory is memory in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: the figures say so
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, MIB)


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy and matrix product of this device, measured now."""
    on_gpu = device.type == "cuda"
    numbers = torch.empty((1 << 30) if on_gpu else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(numbers)
    side = 8192 if on_gpu else 1536
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timings = time_all(
        {"copy": lambda: target.copy_(numbers), "matmul": lambda: left @ right}, device
    )
    return Ceilings(
        copy_gb_per_second=2 * numbers.numel() / timings["copy"].median / 1e6,
        matmul_tflops=2 * side**3 / timings["matmul"].median / 1e9,
    )


def environment(device: torch.device) -> dict[str, str]:
    """What was measured on: device, versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(torch.cpu.get_capabilities().get("cpu_name", name))
    return {
        "device": name,
        "ours": "Triton kernels" if device.type == "cuda" else "PyTorch references (no GPU)",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: metadata.version(package) for package in ("triton", "torchvision")},
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
