"""python -m trainer recipes: what can be refined, and what it takes.

    python -m trainer recipes                       every recipe that ships
    python -m trainer recipes eva-clip-8b           one, or a file, on every GPU
    python -m trainer recipes --gpu L40S --json     for programs

Memory and time are computed by `trainer.estimates`, not measured.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backbone.catalog import Entry, find
from backbone.errors import ModelNotFoundError, RefineryError
from trainer.architecture import Architecture, architecture_of
from trainer.config import Recipe
from trainer.estimates import GPUS, UTILISATION, Cost, Gpu, estimate
from trainer.recipe_file import VARIANTS, Variant, load_recipe, recipe_names, variant_of

_EXIT_USER_ERROR = 2

# The paper's scale (arXiv 2605.19622), which times are given for.
_NUM_IMAGES, _NUM_EPOCHS = 5000, 2
# A terminal has its width; where there is none, no line of the list is broken.
_PIPE_WIDTH = 180
# A larger batch than this is of no use to the method, and need not be counted.
_MANY = 256
# As the recipe says, without, with: the order of `_Costs`.
_CHECKPOINTING = (None, False, True)


class _Costs(NamedTuple):
    """Of a recipe as it is, and without and with gradient checkpointing."""

    own: Cost
    plain: Cost
    checkpointed: Cost


@dataclass(frozen=True)
class _Plan:
    """A recipe and what it runs on; what depends on a model that is not here is None."""

    name: str
    asked_variant: Variant | None
    settings: tuple[str, ...]
    recipe: Recipe
    entry: Entry | None
    architecture: Architecture | None
    costs: _Costs | None

    def command(self) -> str:
        """What refines by this recipe."""
        words = ["python", "-m", "trainer", "--recipe", self.name]
        folder = f"runs/{Path(self.name).stem}"
        if self.asked_variant is not None:
            words += ["--variant", self.asked_variant]
            folder += f"-{self.asked_variant}"
        for setting in self.settings:
            words += ["--set", setting]
        return shlex.join([*words, "--images", "DIR", "--output", folder])


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, or 2 for a mistake that the message names."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.settings and options.name is None:
        parser.error("--set changes one recipe; name it")
    gpu = GPUS[options.gpu]
    try:
        if options.name is None:
            names = [name for name in recipe_names() if name not in VARIANTS]
            plans = [_plan(name, options.variant, missing_ok=True) for name in names]
        else:
            plans = [_plan(options.name, options.variant, options.settings)]
        if options.json:
            values = [_as_values(plan, gpu) for plan in plans]
            text = json.dumps(values if options.name is None else values[0], indent=2)
            sys.stdout.write(text + "\n")
        elif options.name is None:
            _print_list(plans, gpu, options.variant or VARIANTS[0])
        else:
            _print_one(plans[0])
    except RefineryError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return _EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer recipes",
        description="List the recipes with the memory and time they take on a GPU, or show one. "
        "Both are computed, not measured.",
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME|FILE", help="one recipe; without: all that ship")
    add(
        "--gpu",
        type=_gpu_name,
        default="H100",
        metavar="|".join(GPUS),
        help="what the list is computed for (default: H100)",
    )
    add("--variant", choices=VARIANTS, help="of the method (default: the recipe's own, or paper)")
    add(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="SECTION.KEY=VALUE",
        help="change a value of the recipe that is named; may be repeated",
    )
    add("--json", action="store_true", help="print JSON")
    return parser


def _gpu_name(text: str) -> str:
    for name in GPUS:
        if name.lower() == text.lower():
            return name
    raise argparse.ArgumentTypeError(f"no GPU is called {text!r}; there are {', '.join(GPUS)}")


def _plan(
    name: str,
    variant: Variant | None,
    settings: Sequence[str] = (),
    *,
    missing_ok: bool = False,
) -> _Plan:
    recipe = load_recipe(name, settings, variant=variant)
    backbone = recipe.backbone.name
    architecture = costs = None
    try:
        architecture = architecture_of(backbone)
        costs = _Costs(*(estimate(recipe, architecture, checkpointing=c) for c in _CHECKPOINTING))
    except ModelNotFoundError:
        # The recipe `demo` refines a folder of this repository, which an installation has not.
        if not missing_ok:
            raise
    return _Plan(name, variant, tuple(settings), recipe, find(backbone), architecture, costs)


def _as_values(plan: _Plan, gpu: Gpu) -> dict[str, Any]:
    """A plan for programs; without numbers where the model is not here."""
    recipe, entry, batch = plan.recipe, plan.entry, plan.recipe.data.batch_size
    values: dict[str, Any] = {
        "name": plan.name,
        "variant": variant_of(plan.name, plan.asked_variant),
        "backbone": recipe.backbone.name,
        "licence": entry.licence if entry else None,
        "hub": list(entry.hub) if entry else [],
        "notes": list(_notes(recipe)),
        "batch_size": batch,
        "gpu": gpu.name,
        "estimates": "computed, not measured",
    }
    if plan.costs is None:
        return values
    cost = plan.costs.own
    computed = ("size", "border", "parameters", "adapter_parameters", "flops_per_image")
    return values | {
        **{name: getattr(cost, name) for name in computed},
        "memory_gib": round(cost.memory_gib(batch), 1),
        "minutes": round(_minutes(cost, gpu), 1),
        "largest_batch": plan.costs.plain.largest_batch(gpu),
        "largest_batch_checkpointed": plan.costs.checkpointed.largest_batch(gpu),
    }


def _minutes(cost: Cost, gpu: Gpu) -> float:
    return cost.seconds(gpu, num_images=_NUM_IMAGES * _NUM_EPOCHS) / 60


def _notes(recipe: Recipe) -> Iterator[str]:
    """What a backbone's recipe has of its own."""
    hijack = recipe.filters.attention_hijack
    if not hijack.enabled:
        yield "hijack off"
    elif hijack.layers:
        yield f"layers {hijack.layers[0]}-{hijack.layers[1]}"
    if recipe.registers.r_reg != Recipe().registers.r_reg:
        yield f"r_reg {recipe.registers.r_reg}"
    if not recipe.loss.matched:
        yield "unmatched"
    if recipe.run.gradient_checkpointing:
        yield "checkpointing"
    yield f"u {recipe.loss.uniformity}"


def _print_list(plans: list[_Plan], gpu: Gpu, variant: Variant) -> None:
    console = _console()
    table = Table(
        title=f"Recipes, variant {variant}; memory and time computed for {gpu.name}, not measured",
        title_justify="left",
        box=None,
    )
    for name in ("recipe", "backbone"):
        table.add_column(name, no_wrap=True)
    for name in ("M params", "px", "border", "batch", "GiB", "min", "largest batch"):
        table.add_column(name, justify="right")
    table.add_column("recipe's own", no_wrap=True)
    table.add_column("licence of the weights")
    for plan in plans:
        table.add_row(*_list_row(plan, gpu))
    console.print(table)
    console.print(
        f"\nGiB: peak memory at the recipe's batch. min: {_NUM_IMAGES} images x {_NUM_EPOCHS} "
        f"epochs on one GPU at an assumed {UTILISATION:.0%} of its peak. Largest batch: that fits, "
        "without and with run.gradient_checkpointing=true.\n"
        "paper and release, as recipes, are the two variants on SigLIP2 So400m; --variant puts "
        "either under any recipe. Read a model's card before you distribute its weights.\n"
        "python -m trainer recipes NAME shows one.",
        soft_wrap=True,
        highlight=False,
    )


def _list_row(plan: _Plan, gpu: Gpu) -> list[str]:
    recipe, batch = plan.recipe, plan.recipe.data.batch_size
    licence = plan.entry.licence if plan.entry else "-"
    if plan.costs is None:
        computed = ["-", str(recipe.data.size or "-"), "-", str(batch), "-", "-", "-"]
    else:
        cost = plan.costs.own
        computed = [
            f"{cost.parameters / 1e6:.0f}",
            str(cost.size),
            str(cost.border),
            str(batch),
            _memory(cost, batch, gpu),
            _time(cost, gpu),
            " / ".join(_count(c.largest_batch(gpu)) for c in plan.costs[1:]),
        ]
    cells = [plan.name, recipe.backbone.name, *computed, ", ".join(_notes(recipe)), licence]
    return [*map(escape, cells)]


def _memory(cost: Cost, batch: int, gpu: Gpu) -> str:
    fits = batch <= cost.largest_batch(gpu)
    return f"{cost.memory_gib(batch):.1f}" + ("" if fits else " (too much)")


def _time(cost: Cost, gpu: Gpu) -> str:
    minutes = _minutes(cost, gpu)
    if minutes < 1:
        return "< 1"
    return f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"


def _count(batch: int) -> str:
    return str(batch) if batch <= _MANY else f"> {_MANY}"


def _print_one(plan: _Plan) -> None:
    console, recipe, entry = _console(), plan.recipe, plan.entry
    architecture, costs = plan.architecture, plan.costs
    assert architecture is not None  # `_plan` raised otherwise
    assert costs is not None
    cost = costs.own
    side = cost.size // architecture.patch
    rows = {"backbone": recipe.backbone.name}
    if entry is not None:
        rows["timm name"] = entry.timm or entry.architecture
        rows["hub"] = ", ".join(entry.hub)
        rows["licence of the weights"] = entry.licence
        if entry.notes:
            rows["about it"] = entry.notes
    rows |= {
        "parameters": f"{cost.parameters / 1e6:.1f} M",
        "trained": f"{cost.adapter_parameters / 1e6:.2f} M",
        "blocks": f"{architecture.depth} of {architecture.width} channels",
        "images": f"{cost.size} px, {side} x {side} patches of {architecture.patch} px",
        "register border": f"of {cost.border} at each side, {recipe.registers.fill}",
        "recipe's own": ", ".join(_notes(recipe)),
        "batch": f"{recipe.data.batch_size} per GPU"
        + (", with gradient checkpointing" if recipe.run.gradient_checkpointing else ""),
        "work": f"{cost.flops_per_image / 1e12:.2f} TFLOP per image and step",
    }
    table = Table(title=recipe.name, title_justify="left", show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    console.print(table)
    console.print(_gpu_table(costs, recipe.data.batch_size))
    console.print(f"\n{plan.command()}", soft_wrap=True, highlight=False, markup=False)


def _gpu_table(costs: _Costs, batch: int) -> Table:
    table = Table(
        title=f"\nComputed, not measured: {_NUM_IMAGES} images x {_NUM_EPOCHS} epochs on one GPU, "
        f"at an assumed {UTILISATION:.0%} of its peak",
        title_justify="left",
        box=None,
    )
    table.add_column("GPU")
    for name in ("GiB at the batch", "min", "largest batch", "with checkpointing", "min"):
        table.add_column(name, justify="right")
    for gpu in GPUS.values():
        table.add_row(
            gpu.name,
            _memory(costs.own, batch, gpu),
            _time(costs.own, gpu),
            _count(costs.plain.largest_batch(gpu)),
            _count(costs.checkpointed.largest_batch(gpu)),
            _time(costs.checkpointed, gpu),
        )
    return table


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)
