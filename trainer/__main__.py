"""python -m trainer: images and a recipe in, a refined backbone out.

python -m trainer --images photos --output runs/siglip
torchrun --standalone --nproc-per-node=8 -m trainer --images photos --output runs/siglip
python -m trainer recipes
python -m trainer doctor --images photos
"""

import argparse
import json
import logging
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from backbone.errors import RefineryError
from kernels.dispatch import KernelError, check_mode
from trainer.config import Recipe
from trainer.distributed import (
    PeerError,
    Ranks,
    choose_device,
    is_first,
    is_first_here,
    process_group,
)
from trainer.loop import Interrupted, StopRequest
from trainer.recipe_file import VARIANTS, load_recipe, recipe_names
from trainer.run import Summary, refine

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command with --resume

_EPILOG = f"""\
{textwrap.fill("recipes: " + ", ".join(recipe_names()), 100)}

examples:
  python -m trainer --images photos --output runs/siglip
  python -m trainer --recipe release --images photos --output runs/dino --device cuda:0 \\
      --backbone vit_base_patch14_dinov2.lvd142m --set registers.r_reg=37 \\
      --set filters.attention_hijack.enabled=false
  python -m trainer --recipe paper --set loss.lambda_uni=0 --print-recipe
  python -m trainer --images photos --output runs/siglip --resume
  torchrun --standalone --nproc-per-node=8 --shutdown-timeout 240 -m trainer ...

commands: "recipes" lists the recipes with what they need; "doctor" measures, before a run, what the
filters of a recipe would do; each has its own --help. python -m trainer.merge takes the adapter of
a run, to be shipped without weights, and puts one into the weights it belongs to.

The artifact is OUTPUT/refined: serve it with python -m service --model OUTPUT/refined.
REFINERY_KERNELS=auto, triton or reference says what computes filters and losses (default: Triton
kernels on a CUDA device, PyTorch elsewhere).
Exit codes: 0 done; 2 a mistake that the message names; 75 stopped by SIGTERM, 130 by Ctrl-C, with
a checkpoint written (go on with --resume). torchrun ends with 1 in place of any but 0.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["recipes"], ["doctor"]):
        return _run_command(*arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    _set_up_logging(console, is_first=is_first())
    # Before the processes are connected all meet the same mistakes, each machine for itself.
    speaks = is_first_here()
    try:
        recipe = load_recipe(
            options.recipe or options.variant or "paper",
            _settings(options),
            variant=options.variant,
        )
        if options.print_recipe:
            if speaks:
                sys.stdout.write(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")
            return 0
        if options.images is None or options.output is None:
            parser.error("--images and --output are needed")
        device = choose_device(options.device)
        check_mode(device)  # what cannot run is told before anything is loaded
        with StopRequest() as stop, process_group(device) as ranks:
            speaks = True
            return _refine(recipe, options, device, stop, ranks, console)
    except PeerError as error:
        if is_first() and error.is_lost:
            _tell(console, str(error))
        return EXIT_USER_ERROR
    except (RefineryError, KernelError) as error:
        if speaks:
            _tell(console, str(error))
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError as error:
        _tell(
            console,
            f"out of memory: {str(error).splitlines()[0]}\n"
            "set run.gradient_checkpointing=true, with which --resume may go on; or resume with a "
            "lower data.batch_size: data.accumulate follows",
        )
        return EXIT_USER_ERROR


def _refine(
    recipe: Recipe,
    options: argparse.Namespace,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks,
    console: Console,
) -> int:
    try:
        summary = refine(
            recipe,
            options.images,
            options.output,
            device=device,
            stop=stop,
            console=console,
            resume=options.resume,
            skip_bad_images=options.skip_bad_images,
            ranks=ranks,
        )
    except Interrupted as interrupted:
        if ranks.is_first:
            console.print(f"{interrupted}; continue with the same command and --resume")
        return EXIT_INTERRUPTED if interrupted.signum == signal.SIGTERM else 130
    if ranks.is_first:
        _print_summary(summary)
    return 0


def _run_command(name: str, *arguments: str) -> int:
    """A command beside the run; what it needs is imported for it alone."""
    if name == "recipes":
        from trainer.recipes_command import main as list_recipes

        return list_recipes(arguments)
    from trainer.doctor import main as examine

    return examine(arguments)


def _tell(console: Console, error: str) -> None:
    console.print(f"[bold red]error:[/] {escape(error)}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Refine a pre-trained vision transformer: a LoRA adapter is trained on your "
        "images so that dense features lose their spurious tokens, and merged into the weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE", help="recipe (default: paper)")
    add(
        "--variant",
        choices=VARIANTS,
        help="what the recipe lies on: the method as the paper has it, or as the authors' release "
        "(default: the recipe's own, or paper)",
    )
    add(
        "--images",
        type=Path,
        metavar="DIR|FILE",
        help="folder of images, searched recursively; a text file with a path in each line; or tar "
        "shards in the WebDataset format, as in 'train-{0000..0015}.tar'",
    )
    add("--output", type=Path, metavar="DIR", help="folder of the run, made if missing")
    add("--backbone", metavar="NAME|PATH", help="timm name or model folder; sets backbone.name")
    add("--weights", metavar="FILE", help="checkpoint file for it; sets backbone.weights")
    add("--random-weights", action="store_true", help="train on random weights, as a trial")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value of the recipe; may be repeated",
    )
    add("--resume", action="store_true", help="continue the run in --output where it stopped")
    add("--skip-bad-images", action="store_true", help="skip unreadable images instead of stopping")
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: a GPU if any")
    add("--print-recipe", action="store_true", help="print the recipe as JSON and exit")
    return parser


def _settings(options: argparse.Namespace) -> list[str]:
    settings: list[str] = list(options.set)
    if options.backbone is not None:
        settings.append(f"backbone.name={json.dumps(options.backbone)}")
    if options.weights is not None:
        settings.append(f"backbone.weights={json.dumps(options.weights)}")
    if options.random_weights:
        settings.append("backbone.random_weights=true")
    return settings


def _set_up_logging(console: Console, *, is_first: bool) -> None:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%X"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("trainer", "backbone", "kernels", "py.warnings"):
        logging.getLogger(name).setLevel(logging.INFO if is_first else logging.ERROR)
    # Every process meets images of its own.
    logging.getLogger("trainer.data").setLevel(logging.INFO if is_first else logging.WARNING)
    logging.captureWarnings(True)


def _print_summary(summary: Summary) -> None:
    table = Table(show_header=False, box=None)
    speed = summary.metrics.get("images_per_second", float("nan"))
    rows = {
        "artifact": str(summary.artifact),
        "steps": f"{summary.num_steps} in {summary.seconds:.0f} s ({summary.precision})",
        "images": f"{summary.num_images}, {summary.num_skipped} skipped as unreadable",
        "speed": f"{speed:.1f} images/s, {summary.memory_gib:.1f} GiB at most",
        "channels masked": ", ".join(map(str, summary.channels)) or "none",
    }
    for name, value in summary.metrics.items():
        if name in ("loss", "alignment") or name.startswith("clean"):
            rows[name.replace("_", " ")] = f"{value:.3f}"
    rows["serve it"] = f"python -m service --model {summary.artifact}"
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
