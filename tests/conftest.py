"""Settings that must stand before anything is imported, and what is run only where it can be."""

import os
import shutil
import subprocess
from typing import Any

import pytest

# No test may reach for weights: without a network the hub client would retry for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and threads that wait for busy cores cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--engine",
        action="store_true",
        help="run the tests that build and start containers; they need a Docker engine",
    )


def pytest_configure(config: Any) -> None:
    if config.getoption("--engine"):
        if shutil.which("docker") is None:
            raise pytest.UsageError("--engine needs the program docker")
        answer = subprocess.run(["docker", "info"], capture_output=True, text=True)
        if answer.returncode:
            raise pytest.UsageError(f"--engine needs a Docker engine: {answer.stderr.strip()}")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if not config.getoption("--engine"):
        skip = pytest.mark.skip(reason="builds and starts containers: make test-deploy")
        for item in items:
            if "engine" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what did not run here: a long list of skips is easy to overlook."""

    def skipped(marker: str) -> int:
        reports = terminalreporter.stats.get("skipped", [])
        return sum(marker in report.keywords for report in reports)

    if count := skipped("gpu"):
        terminalreporter.section("GPU tests did NOT run", yellow=True, bold=True)
        terminalreporter.line(
            f"{count} tests need a CUDA device and there is none. `make test` runs the kernels "
            "in Triton's interpreter and compiles them for sm_90; `make test-gpu` is for a GPU."
        )
    if count := skipped("engine"):
        terminalreporter.section("Container tests did NOT run", yellow=True, bold=True)
        terminalreporter.line(
            f"{count} tests build the images and start them. `make test-deploy` runs them, where a "
            "Docker engine is."
        )
