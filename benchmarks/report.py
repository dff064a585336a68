"""Results of `benchmarks.serve` as a section of a document, and as a plot."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.serving.outcome import Outcome, Table

_DISTRIBUTIONS = (
    "torch", "torchvision", "timm", "pillow", "fastapi", "starlette", "uvicorn", "uvloop",
    "httptools", "litserve",
)  # fmt: skip
_VERDICTS = {True: "PASS", False: "FAIL", None: "not tried"}


def versions() -> dict[str, str]:
    """What was measured: versions of Python and of the libraries that matter."""
    found = {name: metadata.version(name) for name in _DISTRIBUTIONS}
    return found | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Where it was measured."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name", platform.processor()),
        "amx_bf16": bool(capabilities.get("amx_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def to_markdown(result: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The result as a section of a document."""
    model, about = result["model"], result["machine"]
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    worst = max(result["parity"], key=lambda found: found["relative_error"] / found["bound"])
    lines = [
        f"### {model['backbone']}, {result['size'][0]}x{result['size'][1]} px, "
        f"{model['precision']}, border {model['register_width']}",
        "",
        f"`{result['command']}`",
        "",
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, load "
        f"{about['load_average_before']} before, other programs took "
        f"{result['cores_taken_by_others']:.2f} cores; {software}",
        "",
        f"Parity first: {len(result['parity'])} comparisons of image kind and dtype; nearest to "
        f"its bound: {worst['kind']}, {worst['dtype']}, relative error "
        f"{worst['relative_error']:.2g} of {worst['bound']:.2g}, cosine {worst['min_cosine']:.6f}.",
    ]
    for outcome in outcomes:
        lines += ["", f"#### {outcome.scenario}: {outcome.what}"]
        for table in outcome.tables:
            lines += ["", *_table(table)]
        if outcome.checks:
            checks = [
                [_VERDICTS[check.passed], check.criterion, check.measured]
                for check in outcome.checks
            ]
            lines += ["", *_table(Table("", ("", "criterion", "measured"), checks))]
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Curves of latency over throughput, and memory over time; false when there is neither."""
    import matplotlib  # here: only this needs it, and it is not quick to load

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [outcome for outcome in outcomes if "curve" in outcome.figures]
    memories = [outcome for outcome in outcomes if outcome.figures.get("memory", {}).get("rss_mib")]
    num_axes = len(curves) + len(memories)
    if not num_axes:
        return False
    figure, all_axes = pyplot.subplots(num_axes, 1, figsize=(7, 4 * num_axes), squeeze=False)
    axes = iter(all_axes[:, 0])
    for outcome in curves:
        _draw_curve(next(axes), outcome)
    for outcome in memories:
        points = outcome.figures["memory"]["rss_mib"]
        axis = next(axes)
        axis.plot([at for at, _ in points], [mib for _, mib in points])
        axis.set(title=f"{outcome.scenario}: memory of the server", xlabel="s", ylabel="MiB")
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw_curve(axis: Any, outcome: Outcome) -> None:
    points = outcome.figures["curve"]
    rates = [point["rate"] for point in points]
    for key, style in (("p50", "o-"), ("p99", "s--")):
        axis.plot(rates, [point["latency_ms"].get(key) for point in points], style, label=key)
    for point in points:
        axis.annotate(str(point["concurrency"]), (point["rate"], point["latency_ms"]["p50"]))
    bare = outcome.figures.get("at_knee", {}).get("images_per_second", {}).get("bare")
    if bare:
        axis.axvline(bare, color="grey", label="bare model in a loop")
    axis.axvline(outcome.figures["knee"]["rate"], color="grey", linestyle=":", label="knee")
    axis.set(
        title=f"{outcome.scenario}: closed loop, by concurrency",
        xlabel="images/s",
        ylabel="latency, ms",
        yscale="log",
    )
    axis.legend()


def _table(table: Table) -> list[str]:
    lines = [table.title, ""] if table.title else []
    lines.append(f"| {' | '.join(table.header)} |")
    lines.append("|" + "---|" * len(table.header))
    return lines + [f"| {' | '.join(row)} |" for row in table.rows]
