"""Training speed and memory: one backbone as teacher and student, against two separate ones.

    python -m benchmarks.train --backbone vit_small_patch16_224 --size 224 --batch 8

Both variants take the same step on the same images with the same draws and arrive at the same
loss, which is checked. Each run is a process of its own, so that its peak memory is its own; runs
of the two variants alternate, so that a busy machine disturbs both alike. Weights are random:
neither speed nor memory depends on them.
"""

import argparse
import contextlib
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from backbone import Backbone, has_bf16_matrix_units
from trainer.config import Recipe
from trainer.lora import Adapter
from trainer.recipe_file import load_recipe
from trainer.refiner import Refiner

Variant = Literal["shared", "separate"]
VARIANTS: tuple[Variant, Variant] = ("shared", "separate")
MIB = 2**20


class SeparateTeacher(Refiner):
    """The same step with a second backbone in memory as the teacher."""

    def use_teacher(self, teacher: Backbone) -> None:
        self._student = self.backbone
        self._teacher = teacher.eval().requires_grad_(False)
        self._adapter = _Swapped(self)  # type: ignore[assignment]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        self.backbone = self._teacher
        try:
            yield
        finally:
            self.backbone = self._student


class _Swapped:
    """Stands where the adapter is switched off: changes the model instead."""

    def __init__(self, refiner: SeparateTeacher) -> None:
        self._refiner = refiner
        self._dropout = refiner._adapter.train_dropout

    def off(self) -> contextlib.AbstractContextManager[None]:
        return self._refiner.swapped()

    def train_dropout(self, mode: bool) -> None:
        self._dropout(mode)
        self._refiner._teacher.eval()  # the refiner's own `train` reached it


def run_once(arguments: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """Take some steps in this process and report speed, peak memory and losses."""
    process = psutil.Process()
    before = process.memory_info().rss
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    recipe: Recipe = load_recipe(arguments.recipe)
    backbone = Backbone.load(arguments.backbone, random_weights=True)
    reference = torch.randint(0, 256, (3, arguments.size, arguments.size), dtype=torch.uint8)
    teacher = copy.deepcopy(backbone) if variant == "separate" else None
    adapter = Adapter.attach(backbone, recipe.lora, seed=0)
    kind = SeparateTeacher if variant == "separate" else Refiner
    refiner = kind(
        backbone,
        adapter,
        recipe,
        size=arguments.size,
        reference_3SS=reference,
        bf16=has_bf16_matrix_units(device),
    )
    if isinstance(refiner, SeparateTeacher):
        assert teacher is not None
        refiner.use_teacher(teacher.to(device))
    refiner.to(device).train()
    trained = [parameter for parameter in refiner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    seconds, losses = [], []
    for step in range(arguments.warmup + arguments.steps):
        draws = refiner.draw(arguments.batch, progress=0.5, generator=generator)
        started = time.perf_counter()
        output = refiner(images, draws)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())  # waits for the device
        if step >= arguments.warmup:
            seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return {
        "images_per_second": arguments.batch / statistics.median(seconds),
        "peak_mib": peak / MIB,
        "weights_mib": weights / MIB,
        "losses": losses,
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.variant:
        sys.stdout.write(json.dumps(run_once(arguments, arguments.variant)) + "\n")
        return
    runs: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(arguments.repeats):
        order = VARIANTS if repeat % 2 == 0 else VARIANTS[::-1]
        for variant in order:
            runs[variant].append(_in_process(variant))
    shared, separate = (runs[variant] for variant in VARIANTS)
    for one, two in zip(shared[0]["losses"], separate[0]["losses"], strict=True):
        if abs(one - two) > 1e-2 * abs(two):
            raise SystemExit(f"the variants disagree: loss {one} against {two}")

    def median(of: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(run[key] for run in of))

    result = {
        "command": "python -m benchmarks.train " + " ".join(sys.argv[1:]),
        "machine": _machine(arguments.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "weights_mib": shared[0]["weights_mib"],
        "images_per_second": {v: median(runs[v], "images_per_second") for v in VARIANTS},
        "peak_mib": {v: median(runs[v], "peak_mib") for v in VARIANTS},
        "speed_ratio": median(shared, "images_per_second") / median(separate, "images_per_second"),
        "memory_ratio": median(shared, "peak_mib") / median(separate, "peak_mib"),
    }
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities()
    matrix_units = "AMX" if capabilities.get("amx_bf16") else "no bf16 matrix units"
    return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} cores, {matrix_units}"


def _in_process(variant: Variant) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--variant", variant]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Training images/s and peak memory: one backbone against two.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="timm model name")
    parser.add_argument("--recipe", default="paper", help="recipe name or file")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
