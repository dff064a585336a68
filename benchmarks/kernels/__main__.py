"""Times the kernels of this project against library calls: correctness first, then the clock.

    python -m benchmarks.kernels --output build/kernels                 # this machine's GPU, or CPU
    python -m benchmarks.kernels --device cpu --operations roi_align --batches 1

A case is timed only when its result is right: at most twice the error of the library's computation
in the same number format, against float64. Writes kernels.csv, kernels.md and kernels.png.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.kernels.cases import GENERATORS, OURS, SHAPES, Case
from benchmarks.kernels.measure import (
    Ceilings,
    ceilings,
    environment,
    peak_mib,
    return_memory_at_once,
    time_all,
)
from benchmarks.kernels.table import Row, plot, to_markdown, write_csv
from kernels.dispatch import KernelError, check_mode

logger = logging.getLogger("benchmarks.kernels")

_GPU_BATCHES, _CPU_BATCHES = (1, 8, 64), (1,)
_FLOOR = 1e-6  # error that is always allowed, relative to the largest value


class WrongResultError(RuntimeError):
    """A result that is not exact enough; it is not worth a time."""


def main() -> int:
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # so that processor time is the time of the work
        return_memory_at_once()
    torch.set_default_device(device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    limits = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    where = environment(device)
    command = f"python -m benchmarks.kernels {shlex.join(sys.argv[1:])}".rstrip()
    rows: list[Row] = []
    failed = 0
    for case in _cases(arguments, device):
        try:
            rows += measure(case, device, limits)
        except (WrongResultError, torch.OutOfMemoryError) as error:
            logger.error("failed: %s, %s, batch %d, %s, %s: %s", *case[:5], error)
            failed += 1
            continue
        # After every case: whatever ends the run, what was measured stays.
        write_csv(rows, where, arguments.output / "kernels.csv")
        text = to_markdown(rows, where, limits, command)
        (arguments.output / "kernels.md").write_text(text)
    if rows:
        plot(rows, arguments.output / "kernels.png")
    logger.info("%d rows in %s; %d cases failed", len(rows), arguments.output, failed)
    return 1 if failed or not rows else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--device",
        default="cuda" if has_gpu else "cpu",
        choices=["cuda", "cpu"],
        help="cuda: the kernels; cpu: their PyTorch references (default: cuda where there is one)",
    )
    parser.add_argument(
        "--operations",
        nargs="+",
        default=list(GENERATORS),
        choices=GENERATORS,
        help="what to time (default: all)",
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, help="images (default: 1 8 64 on a GPU, 1 on a CPU)"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[shape.name for shape in SHAPES],
        choices=[shape.name for shape in SHAPES],
        help="backbones and sizes (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/kernels"),
        metavar="FOLDER",
        help="where the table and the plot go (default: build/kernels)",
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not has_gpu:
        parser.error("--device is cuda, but there is no CUDA device here")
    try:
        check_mode(torch.device(arguments.device))
    except KernelError as error:
        parser.error(str(error))
    return arguments


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    batches = arguments.batches or (_GPU_BATCHES if on_gpu else _CPU_BATCHES)
    for operation in arguments.operations:
        for shape in SHAPES:
            if shape.name not in arguments.shapes:
                continue
            for batch in batches:
                for dtype in _dtypes(operation, on_gpu):
                    yield from GENERATORS[operation](shape, batch, dtype)


def _dtypes(operation: str, on_gpu: bool) -> tuple[torch.dtype, ...]:
    """What the operation meets in use: losses get unit tokens in float32."""
    if operation == "contrastive":
        return (torch.float32,)
    if operation == "similarity":
        return (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    if operation == "attention" and not on_gpu:
        return (torch.float32, torch.bfloat16)
    return (torch.bfloat16,) if on_gpu else (torch.float32,)


def measure(case: Case, device: torch.device, limits: Ceilings) -> list[Row]:
    """Every contender of a case that passed the gate.

    Raises:
        WrongResultError: ours is not exact enough.
    """
    check(case)
    timings = time_all(case.contenders, device)
    own = timings[OURS].median
    rows = []
    for name, timing in timings.items():
        gb_per_second = case.num_bytes / timing.median / 1e6
        tflops = case.flops / timing.median / 1e9
        rows.append(
            Row(
                *case[:5],
                contender=name,
                ms_median=timing.median,
                ms_p20=timing.low,
                ms_p80=timing.high,
                times_ours=timing.median / own,
                peak_mib=peak_mib(case.contenders[name], device),
                gb_per_second=gb_per_second,
                share_of_copy=gb_per_second / limits.copy_gb_per_second,
                tflops=tflops,
                share_of_matmul=tflops / limits.matmul_tflops,
            )
        )
    logger.info(
        "%s, %s, batch %d, %s, %s: %.3g ms; %s",
        *case[:5],
        own,
        ", ".join(f"{row.contender} {row.times_ours:.2f}x" for row in rows[1:]),
    )
    return rows


def check(case: Case) -> None:
    """Ours is at most twice as wrong as the library in the same number format.

    Raises:
        WrongResultError: it is not.
    """
    exact = _tensor(case.exact())
    floor = _FLOOR * exact.abs().max().item()
    errors = {
        name: (_tensor(run()).double() - exact).abs().max().item()
        for name, run in case.contenders.items()
        if name.startswith(OURS) or name == case.alike
    }
    for name, error in errors.items():
        if not error <= 2 * errors[case.alike] + floor:
            raise WrongResultError(
                f"{name} has an error of {error:.3g}, {case.alike} of {errors[case.alike]:.3g}; "
                "not timed"
            )


def _tensor(result: object) -> torch.Tensor:
    assert isinstance(result, torch.Tensor)
    return result


if __name__ == "__main__":
    sys.exit(main())
