"""Speed and memory of the training step, against a plain implementation with two models.

    python -m benchmarks.train                                   # ViT-S/16, 224 px, batch 4, CPU
    python -m benchmarks.train --device cuda --batch 16 --size 512 \\
        --backbone vit_so400m_patch16_siglip_512.v2_webli

`benchmarks.training.baseline` is the step as one would write it down from the method: teacher and
student apart, PEFT's layers, whole matrices of attention and similarity. Before anything is timed,
loss and gradients of the two are compared. Every measurement is a process of its own, so that its
peak memory is its own, and the kinds take turns, so that a busy machine disturbs all alike. Weights
and images are random: neither speed nor memory depends on them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.training.measure import Kind, check, measure

KINDS: tuple[Kind, ...] = get_args(Kind)
# Relative differences that rounding explains: filters decide token by token, at a threshold.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "auto": 0.1}


def main() -> None:
    arguments = parse_arguments()
    if arguments.part:
        part = check(arguments) if arguments.part == "check" else measure(arguments, arguments.part)
        sys.stdout.write(json.dumps(part) + "\n")
        return
    result: dict[str, Any] = {
        "command": "python -m benchmarks.train " + " ".join(sys.argv[1:]),
        "machine": _machine(arguments.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipes": {},
    }
    for recipe in arguments.recipes:
        differences = _in_process("check", recipe)
        worst = max(differences.values())
        if not worst <= TOLERANCE[arguments.precision]:
            raise SystemExit(f"recipe {recipe}: the implementations disagree: {differences}")
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in arguments.kinds}
        for repeat in range(arguments.repeats):
            order = arguments.kinds if repeat % 2 == 0 else arguments.kinds[::-1]
            for kind in order:
                runs[kind].append(_in_process(kind, recipe))
        kinds = {kind: _summary(measured) for kind, measured in runs.items()}
        result["recipes"][recipe] = {"differences": differences, **kinds}
        _print(recipe, kinds)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the processes of a kind."""
    summary: dict[str, Any] = {}
    for name, value in runs[0].items():
        if name == "stages":
            summary[name] = {
                stage: statistics.median(run[name].get(stage, 0.0) for run in runs)
                for stage in value
            }
        elif isinstance(value, str):
            summary[name] = value
        else:
            summary[name] = statistics.median(run[name] for run in runs)
    return summary


def _print(recipe: str, kinds: dict[str, dict[str, Any]]) -> None:
    plain = kinds.get("baseline")
    lines = [f"recipe {recipe}"]
    for kind, of in kinds.items():
        line = (
            f"  {kind:13} {of['images_per_second']:7.2f} images/s, "
            f"{of['cpu_seconds_per_image']:6.3f} CPU s/image, {of['peak_mib']:8.0f} MiB "
            f"({of['weights_mib']:.0f} of weights), {of['tflop_per_image']:.3f} TFLOP/image"
        )
        if "mfu" in of:
            line += f", MFU {of['mfu']:.2f}"
        lines.append(line)
        if plain is not None and kind != "baseline":
            speed = of["images_per_second"] / plain["images_per_second"]
            cpu = plain["cpu_seconds_per_image"] / of["cpu_seconds_per_image"]
            memory = of["peak_mib"] / plain["peak_mib"]
            lines.append(
                f"  {'':13} against the baseline: speed {speed:.2f} (by CPU time {cpu:.2f}), "
                f"memory {memory:.2f}"
            )
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in of["stages"].items())
        lines.append(f"  {'':13} seconds of a step: {stages}")
    sys.stdout.write("\n".join(lines) + "\n")


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities()
    matrix_units = "AMX" if capabilities.get("amx_bf16") else "no bf16 matrix units"
    return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} cores, {matrix_units}"


def _in_process(part: str, recipe: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:]]
    command += ["--part", part, "--recipe", recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Training images/s and peak memory, against a plain two-model implementation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--backbone", default="vit_small_patch16_224", help="timm model name")
    add("--recipes", nargs="+", default=["paper", "release"], help="recipe names or files")
    add("--kinds", nargs="+", default=["ours", "baseline"], choices=KINDS, help="what to measure")
    add("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="change the recipes")
    add("--size", type=int, default=224, help="side of the images in pixels")
    add("--batch", type=int, default=4, help="images per step")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the backbone")
    add("--steps", type=int, default=4, help="timed steps of a process")
    add("--warmup", type=int, default=1, help="steps before those")
    add("--repeats", type=int, default=3, help="processes of each kind")
    add("--device", default="cpu", help="cpu or cuda")
    add("--json", type=Path, help="file for the result")
    add("--part", choices=("check", *KINDS), help=argparse.SUPPRESS)
    add("--recipe", default="paper", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
