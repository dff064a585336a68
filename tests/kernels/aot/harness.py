"""Compile the kernels for sm_90 without a GPU, and read what the compiler made of them.

    python -m tests.kernels.aot.harness [OPERATION ...] [--jobs N] [--output FILE]

The project's own launchers run on fake CUDA tensors, with a driver that only claims to be a
Hopper GPU, and every launch becomes a compile: strides, grids and tile tables are those of a real
call. The `triton` that is imported compiles; put another version first on PYTHONPATH to use that.
TRITON_INTERPRET must not be set.
"""

import argparse
import csv
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import tiles
from tests.kernels.aot.case import Case

OPERATIONS = ("attention", "attention_flow", "contrastive", "roi_align", "similarity")
MAX_SHARED = 232_448  # bytes that one program may ask for on sm_90
TableRow = tuple[str, int]  # name of a list of `configs/sm_90.json`, position in it
_REGISTERS_OF_SM = 65_536
_SHARED_OF_SM = 233_472
_RESERVED_SHARED = 1024  # of every resident program


class Resources(NamedTuple):
    """A row of the table: what one kernel of one case needs, and which instructions it has."""

    triton: str
    case: str
    kernel: str
    warps: int
    registers: int
    shared_bytes: int
    programs_per_sm: int
    stack_bytes: int
    local_bytes: int
    local_accesses: int  # LDL, STL
    hgmma: int  # warp-group matrix instructions, those of Hopper
    hmma: int  # matrix instructions of older GPUs, at half the rate
    async_copies: int  # LDGSTS, UTMALDG
    narrow_accesses: int  # loads and stores of 2 bytes
    has_dot: bool


class _HopperOnPaper:
    """As much of a Triton driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def cases_of(operation: str) -> list[Case]:
    module = importlib.import_module(f"tests.kernels.aot.{operation}")
    return [
        case._replace(name=f"{operation}: {case.name}")  # the table has one list of names
        for case in module.cases()
    ]


def compile_case(case: Case) -> tuple[list[Resources], set[TableRow]]:
    """Every kernel that the case launches, in order of launch, and the rows it takes tiles from."""
    compiled: list[Any] = []
    taken: set[TableRow] = set()

    def launch_is_compile(function: JITFunction[Any], _grid: object) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled.append(function.warmup(*args, grid=(1,), **kwargs))

        return launch

    def choose_row(rows: str, device: torch.device, facts: dict[str, int]) -> dict[str, Any]:
        row = real_row(rows, device, facts)
        taken.add((rows, tiles._table("sm_90")[rows].index(row)))
        return row

    real_launch, real_row = JITFunction.__getitem__, tiles._row
    real_architecture = tiles.architecture
    JITFunction.__getitem__, tiles._row = launch_is_compile, choose_row
    tiles.architecture = lambda _device: "sm_90"
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            # Triton asks a fake tensor for its address; 0 is as aligned as any real one.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            case.launch()
    finally:
        JITFunction.__getitem__, tiles._row = real_launch, real_row
        tiles.architecture = real_architecture
    return list(dict.fromkeys(_read(case.name, kernel) for kernel in compiled)), taken


def untaken_rows(taken: Iterable[TableRow]) -> Iterator[str]:
    """Rows of tiles that no case compiled with."""
    for name, rows in tiles._table("sm_90").items():
        for index, row in enumerate(rows):
            if "tiles" in row and (name, index) not in taken:
                yield f"sm_90.json, {name}, row {index} ({row.get('up_to', 'the last')}): no case"


def violations(rows: Iterable[Resources], cases: Iterable[Case]) -> Iterator[str]:
    """What a kernel must not need or lack, said in words."""
    rows = list(rows)
    for row in rows:
        where = f"{row.case}, {row.kernel}, triton {row.triton}"
        if row.stack_bytes or row.local_bytes or row.local_accesses:
            yield f"{where}: spills ({row.stack_bytes} B stack, {row.local_accesses} accesses)"
        if row.narrow_accesses:
            yield f"{where}: {row.narrow_accesses} loads or stores of 2 bytes"
        if row.shared_bytes > MAX_SHARED:
            yield f"{where}: {row.shared_bytes} B of shared memory, {MAX_SHARED} there are"
        if row.programs_per_sm < 1:
            yield f"{where}: does not fit a multiprocessor"
        if row.has_dot and (not row.hgmma or row.hmma):
            yield f"{where}: multiplies without Hopper's instructions ({row.hmma} HMMA)"
    for case in cases:
        own = [row for row in rows if row.case == case.name]
        if not own:
            yield f"{case.name}: launched nothing"
        elif case.has_mma and not any(row.has_dot for row in own):
            yield f"{case.name}: no kernel multiplies matrices"


def _read(case: str, kernel: Any) -> Resources:
    usage, sass = _disassemble(kernel.asm["cubin"])
    number = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    }
    warps, registers = kernel.metadata.num_warps, number["REG"]
    # `-res-usage` counts static shared memory only; Triton's is dynamic.
    shared = kernel.metadata.shared
    by_registers = _REGISTERS_OF_SM // (max(registers, 1) * 32 * warps)
    by_shared = _SHARED_OF_SM // (shared + _RESERVED_SHARED)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Resources(
        triton=triton.__version__,
        case=case,
        kernel=kernel.name,
        warps=warps,
        registers=registers,
        shared_bytes=shared,
        programs_per_sm=min(by_registers, by_shared, 64 // warps, 32),
        stack_bytes=number["STACK"],
        local_bytes=number["LOCAL"],
        local_accesses=count(r"\b(?:LDL|STL)\b"),
        hgmma=count(r"\bHGMMA"),
        hmma=count(r"\bHMMA"),
        async_copies=count(r"\bLDGSTS|\bUTMALDG"),
        narrow_accesses=count(r"\b(?:LDG|STG)\.E[.\w]*\.[US]16\b"),
        has_dot="tt.dot" in kernel.asm["ttir"],
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True)
            for tool, *flags in (
                (triton.knobs.nvidia.cuobjdump.path, "-res-usage"),
                (triton.knobs.nvidia.nvdisasm.path, "-c"),
            )
        ]
    return outputs[0].stdout, outputs[1].stdout


def _prepare() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    triton.runtime.driver.set_active(_HopperOnPaper())


def _compile_numbered(task: tuple[str, int]) -> tuple[list[Resources], set[TableRow]]:
    operation, index = task
    return compile_case(cases_of(operation)[index])


class Compiled(NamedTuple):
    """Everything that some operations compile to, in order, and the tile rows they take."""

    rows: list[Resources]
    cases: list[Case]
    taken: set[TableRow]


def compile_all(operations: Iterable[str], jobs: int) -> Compiled:
    cases = {operation: cases_of(operation) for operation in operations}
    tasks = [(operation, index) for operation in cases for index in range(len(cases[operation]))]
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare) as pool:
        tables = pool.map(_compile_numbered, tasks, chunksize=1)
    return Compiled(
        [row for rows, _ in tables for row in rows],
        [case for own in cases.values() for case in own],
        {row for _, taken in tables for row in taken},
    )


def write_table(rows: Iterable[Resources], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.aot.harness", description=__doc__.split("\n")[0]
    )
    parser.add_argument("operations", nargs="*", default=OPERATIONS, metavar="OPERATION")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="table in CSV (default: to the terminal)")
    arguments = parser.parse_args()
    _prepare()
    compiled = compile_all(arguments.operations, arguments.jobs)
    if arguments.output:
        write_table(compiled.rows, arguments.output)
    else:
        for row in compiled.rows:
            sys.stdout.write(
                " ".join(f"{name}={value}" for name, value in row._asdict().items()) + "\n"
            )
    broken = list(violations(compiled.rows, compiled.cases))
    if set(arguments.operations) == set(OPERATIONS):
        broken += untaken_rows(compiled.taken)
    for violation in broken:
        sys.stderr.write(f"{violation}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
