"""One process's share of `benchmarks.train`: some steps of one kind, timed and weighed."""

import argparse
import contextlib
import gc
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import trainer.refiner
from backbone import Backbone, has_bf16_matrix_units
from benchmarks.training.baseline import Baseline
from trainer.config import Recipe
from trainer.draws import StepDraws
from trainer.lora import Adapter
from trainer.optim import make_optimizer
from trainer.recipe_file import load_recipe
from trainer.refiner import Refiner

Kind = Literal["ours", "checkpointed", "baseline"]
MIB = 2**20
# Dense bf16 operations per second, of the manufacturer's data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
# Methods and functions that are a stage's time, in either implementation.
_STAGES = {
    Refiner: {
        "_student_view": "student",
        "_consistency_target": "student",
        "_teacher_view": "teacher",
    },
    Baseline: {
        "_surrounded": "student",
        "_teach": "teacher",
        "_clean": "filters",
        "_loss": "losses",
    },
    trainer.refiner: {
        "match_targets": "filters",
        "find_clean": "filters",
        "choose_candidates": "filters",
        "sum_losses": "losses",
        "consistency_loss": "losses",
    },
}
_CHECK = ("lora.dropout=0", "filters.fp_gp.criterion=zscore", "filters.register_guided.threshold=1")


def make_recipe(arguments: argparse.Namespace, *more: str) -> Recipe:
    """The recipe, with layers for the attention filter that any backbone has."""
    settings = ["filters.attention_hijack.layers=none", *arguments.set, *more]
    return load_recipe(arguments.recipe, settings)


class Step:
    """A step of one kind, with its optimiser; images, weights and draws are the same for all."""

    def __init__(self, arguments: argparse.Namespace, kind: Kind, recipe: Recipe) -> None:
        self.device = torch.device(arguments.device)
        self._batch, size = arguments.batch, arguments.size
        torch.manual_seed(0)
        backbone = Backbone.load(arguments.backbone, random_weights=True)
        generator = torch.Generator().manual_seed(0)
        reference = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator)
        bf16 = (
            has_bf16_matrix_units(self.device)
            if arguments.precision == "auto"
            else arguments.precision == "bf16"
        )
        self.precision = "bf16" if bf16 else "fp32"
        self.weights_mib = sum(p.numel() * p.element_size() for p in backbone.parameters()) / MIB
        self.module: nn.Module
        if kind == "baseline":
            drawing = _shape_of(recipe, arguments)
            baseline = Baseline(
                backbone, recipe, size=size, width=drawing.width, reference_3SS=reference
            )
            baseline.bf16 = bf16
            self.module, self.draw = baseline, drawing.draw
        else:
            adapter = Adapter.attach(backbone, recipe.lora, seed=0)
            if kind == "checkpointed":
                backbone.vit.set_grad_checkpointing()
            refiner = Refiner(
                backbone, adapter, recipe, size=size, reference_3SS=reference, bf16=bf16
            )
            self.module, self.draw = refiner, refiner.draw
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if "lora_" in name:
                    values = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.02 * values)
        self.module.to(self.device).train()
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.optimizer = make_optimizer(named, recipe.optim, global_batch=self._batch)
        shape = (self._batch, 3, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self._images = images.to(self.device)
        self._generator = generator

    def forward(self) -> Tensor:
        """The loss of the next step."""
        draws: StepDraws = self.draw(self._batch, progress=0.5, generator=self._generator)
        output = self.module(self._images, draws)
        loss: Tensor = output if isinstance(output, Tensor) else output.loss
        return loss

    def take(self, stage: Callable[[str], Any] = contextlib.nullcontext) -> float:
        """A whole step; its loss, which waits for the device."""
        loss = self.forward()
        with stage("backward"):
            torch.autograd.backward(loss)
        with stage("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def check(arguments: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of a step without dropout, whose masks the two draw differently."""
    recipe = make_recipe(arguments, *_CHECK)
    losses, gradients = [], []
    kinds: tuple[Kind, ...] = ("ours", "baseline")
    for kind in kinds:
        step = Step(arguments, kind, recipe)
        loss = step.forward()
        torch.autograd.backward(loss)
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in step.trained if p.grad is not None]))
    ours, theirs = gradients
    return {
        "loss_difference": abs(losses[0] - losses[1]) / abs(losses[1]),
        "gradient_difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def measure(arguments: argparse.Namespace, kind: Kind) -> dict[str, Any]:
    """Speed, peak memory, stages and operations of some steps in this process."""
    before = psutil.Process().memory_info().rss
    step = Step(arguments, kind, make_recipe(arguments))
    gc.collect()
    _reset_peak(step.device)
    seconds, cpu_seconds = [], []
    for number in range(arguments.warmup + arguments.steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        step.take()
        if number >= arguments.warmup:
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    peak = _peak(step.device, before)
    stages = _stages(step)
    with FlopCounterMode(display=False) as counter:
        step.take()
    median = statistics.median(seconds)
    result = {
        "images_per_second": arguments.batch / median,
        "cpu_seconds_per_image": statistics.median(cpu_seconds) / arguments.batch,
        "peak_mib": peak / MIB,
        "weights_mib": step.weights_mib,
        "precision": step.precision,
        "stages": stages,
        "tflop_per_image": counter.get_total_flops() / arguments.batch / 1e12,
    }
    name = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else ""
    known = [peak for part, peak in PEAKS.items() if part in name]
    if known and step.precision == "bf16" and kind != "checkpointed":
        result["mfu"] = counter.get_total_flops() / median / known[0]
    return result


def _shape_of(recipe: Recipe, arguments: argparse.Namespace) -> Refiner:
    """A refiner that is asked for draws alone, over a backbone without weights."""
    with torch.device("meta"):
        backbone = Backbone.load(arguments.backbone, random_weights=True)
        adapter = Adapter(backbone, nn.Module())  # type: ignore[arg-type]
    blank = torch.zeros(3, arguments.size, arguments.size, dtype=torch.uint8)
    return Refiner(backbone, adapter, recipe, size=arguments.size, reference_3SS=blank)


def _stages(step: Step) -> dict[str, float]:
    """Seconds of a step by stage; what is in none is `data`: draws, crops, composites."""
    spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        _wait(step.device)
        started = time.perf_counter()
        yield
        _wait(step.device)
        spent[name] += time.perf_counter() - started

    with contextlib.ExitStack() as stack:
        for owner, names in _STAGES.items():
            for name, of in names.items():
                stack.enter_context(_timed(owner, name, of, stage))
        _wait(step.device)
        started = time.perf_counter()
        step.take(stage)
        total = time.perf_counter() - started
    return {"data": total - sum(spent.values()), **spent}


@contextlib.contextmanager
def _timed(owner: Any, name: str, of: str, stage: Callable[[str], Any]) -> Iterator[None]:
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with stage(of):
            return original(*args, **kwargs)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not everywhere allowed: the peak is then of the start too
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device, before: int) -> float:
    """Bytes at most: on a GPU those of tensors, else the process's without its libraries."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024 - before
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024 - before
