"""The kernels compile for Hopper, on both ends of the supported range of Triton, as planned."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.kernels.aot.case import Case
from tests.kernels.aot.harness import Resources, untaken_rows, violations
from tests.support import ROOT

TABLE = ROOT / "benchmarks" / "results" / "kernel_resources_sm90.csv"
OLDEST = "3.6.0"
OLDEST_FOLDER = ROOT / "build" / f"triton-{OLDEST}"
GOOD = Resources(
    triton="3.9.0",
    case="a",
    kernel="k",
    warps=4,
    registers=128,
    shared_bytes=65536,
    programs_per_sm=3,
    stack_bytes=0,
    local_bytes=0,
    local_accesses=0,
    hgmma=8,
    hmma=0,
    async_copies=8,
    narrow_accesses=0,
    has_dot=True,
)


def compile_everything(version: str, output: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"PYTHONPATH": str(ROOT)}
    if version != triton.__version__:
        environment["PYTHONPATH"] = f"{OLDEST_FOLDER}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot.harness", "--output", str(output)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def rows(path: Path, version: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["triton"] == version]


@pytest.mark.slow
@pytest.mark.parametrize("version", [triton.__version__, OLDEST])
def test_kernels_compile_for_hopper_with_the_resources_on_record(version, tmp_path):
    if version == OLDEST and not OLDEST_FOLDER.is_dir():
        pytest.skip(f"no {OLDEST_FOLDER}: `make test` installs triton {OLDEST} there")

    done = compile_everything(version, tmp_path / "table.csv")

    assert done.returncode == 0, done.stderr
    recorded, found = rows(TABLE, version), rows(tmp_path / "table.csv", version)
    changed = [row for row in found if row not in recorded]
    gone = [row for row in recorded if row not in found]
    assert not changed, f"not on record (renew with `make kernel-resources`): {changed}"
    assert not gone, f"on record, but no longer compiled: {gone}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"local_accesses": 2}, "spills"),
        ({"narrow_accesses": 16}, "2 bytes"),
        ({"shared_bytes": 240_000}, "shared memory"),
        ({"programs_per_sm": 0}, "does not fit"),
        ({"hgmma": 0, "hmma": 64}, "Hopper"),
        ({"case": "b"}, "launched nothing"),
        ({"has_dot": False}, "no kernel multiplies"),
    ],
)
def test_every_rule_can_be_broken(change, words):
    case = Case("a", lambda: None, has_mma=True)

    assert not list(violations([GOOD], [case]))
    assert any(words in line for line in violations([GOOD._replace(**change)], [case]))


def test_a_row_of_tiles_that_no_case_compiles_is_told():
    assert any("attention, row 0" in line for line in untaken_rows([]))
    assert not any("attention, row 0" in line for line in untaken_rows([("attention", 0)]))
