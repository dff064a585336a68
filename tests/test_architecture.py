"""The floors of the project hold: imports go downwards, trainer and service never meet."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 0, "backbone": 1, "trainer": 2, "service": 2}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_downwards(package):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules

    for path in modules:
        for other in imported_packages(path) & FLOORS.keys() - {package}:
            assert FLOORS[other] < FLOORS[package], f"{path} imports {other}"


def test_the_check_sees_an_upward_import(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from trainer.losses import x\n    import service.app\n")

    assert imported_packages(module) == {"trainer", "service"}


def test_kernels_need_torch_and_triton_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        third_party = imported_packages(path) - {"kernels"} - sys.stdlib_module_names
        assert third_party <= {"torch", "triton"}, path


def test_the_other_distribution_called_kernels_is_not_installed():
    # Its import name is ours: with both installed, `import peft` fails far from the cause.
    names = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}

    assert "kernels" not in names
