"""Results of `benchmarks.serve` as a section of a document."""

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

_DISTRIBUTIONS = ("torch", "timm", "pillow", "fastapi", "starlette", "uvicorn")


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
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a section of a document."""
    model, rate = result["model"], result["images_per_second"]
    rows = [
        ("served images/s", f"{rate['served']:.1f}"),
        ("bare images/s", f"{rate['bare']:.1f}"),
        ("pipelined images/s", f"{rate['pipelined']:.1f}"),
        ("served / bare", f"{result['served_over_bare']:.2f}"),
        ("served / pipelined", f"{result['served_over_pipelined']:.2f}"),
        ("cores taken by other programs", f"{result['cores_taken_by_others']:.2f}"),
        ("mean batch", f"{result['mean_batch']:.1f}"),
        ("latency p50, p99", "{p50:.0f} ms, {p99:.0f} ms".format(**result["latency_ms"])),
        *((f"stage {name}", f"{value:.1f} ms") for name, value in result["stage_ms"].items()),
        ("response", f"{result['response_bytes'] / 1024:.0f} KiB"),
    ]
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = result["machine"]
    return "\n".join(
        [
            f"### {model['backbone']}, {result['size'][0]}x{result['size'][1]} px, "
            f"{model['precision']}, border {model['register_width']}",
            "",
            f"`{result['command']}`",
            "",
            f"{about['cpu']}, {about['cores']} cores, load {about['load_average_before']} before; "
            f"{result['clients']} clients, {result['images']} images, medians of "
            f"{len(result['rounds']['served'])} rounds; {software}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )
