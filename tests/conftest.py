"""Settings that must stand before anything is imported."""

import os
from typing import Any

# No test may reach for weights: without a network the hub client would retry for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and threads that wait for busy cores cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly when no kernel ran on a GPU: a long list of skips is easy to overlook."""
    skipped = sum("gpu" in report.keywords for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.section("GPU tests did NOT run", yellow=True, bold=True)
        terminalreporter.line(
            f"{skipped} tests need a CUDA device and there is none. `make test` runs the kernels "
            "in Triton's interpreter and compiles them for sm_90; `make test-gpu` is for a GPU."
        )
