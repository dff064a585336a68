"""python -m trainer doctor: what a recipe's thresholds do to a backbone, before it is refined.

    python -m trainer doctor --recipe demo --images photos

It computes what the filters of the first training step would see, prints what each keeps, suggests
values where one keeps too little or too much, and writes a page with the distributions.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backbone import find_devices
from backbone.errors import RefineryError
from kernels.dispatch import KernelError, check_mode
from trainer.doctor.page import write_page
from trainer.doctor.report import Report, examine
from trainer.errors import TrainerError
from trainer.recipe_file import VARIANTS

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    console = Console(stderr=True)
    started = time.monotonic()
    try:
        if options.output.is_dir() or not options.output.parent.is_dir():
            raise TrainerError(
                f"the page cannot be written to {options.output}; give --output a file in a folder "
                "that exists"
            )
        device = torch.device(find_devices(options.device)[0])
        check_mode(device)
        report = examine(
            options.recipe or options.variant or "paper",
            _settings(options),
            options.images,
            variant=options.variant,
            num_images=options.num_images,
            device=device,
            skip_bad_images=options.skip_bad_images,
        )
        _write(options.output, write_page(report))
    except (RefineryError, KernelError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError as error:
        console.print(
            f"[bold red]error:[/] out of memory: {escape(str(error).splitlines()[0])}\n"
            "images are measured one at a time: set a smaller data.size, or use a larger device",
            soft_wrap=True,
        )
        return EXIT_USER_ERROR
    _print_report(report, options.output, time.monotonic() - started)
    return 0


def _write(path: Path, page: str) -> None:
    try:
        # Names of files may hold bytes that are no text.
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise TrainerError(f"the page cannot be written to {path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="images that a run would take")
    add("--backbone", metavar="NAME|PATH", help="default: the recipe's; an artifact works too")
    add("--weights", metavar="FILE", help="checkpoint file for it")
    add("--random-weights", action="store_true", help="measure random weights, as a trial")
    add("--recipe", metavar="NAME|FILE", help="recipe (default: paper)")
    add("--variant", choices=VARIANTS, help="what the recipe lies on (default: its own, or paper)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a value")
    add("--num-images", type=_count, default=32, metavar="N", help="images used (default 32)")
    add("--skip-bad-images", action="store_true", help="skip unreadable images")
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: a GPU if any")
    add("--output", type=Path, default=Path("doctor.html"), help="page (default: doctor.html)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of images; give 1 or more")
    return int(text)


def _settings(options: argparse.Namespace) -> list[str]:
    settings: list[str] = list(options.set)
    if options.backbone is not None:
        settings.append(f"backbone.name={json.dumps(options.backbone)}")
    if options.weights is not None:
        settings.append(f"backbone.weights={json.dumps(options.weights)}")
    if options.random_weights:
        settings.append("backbone.random_weights=true")
    return settings


def _print_report(report: Report, page: Path, seconds: float) -> None:
    console = Console()
    console.print(escape(report.facts), soft_wrap=True)
    table = Table("kept, in percent", box=None, pad_edge=False)
    table.add_column("recipe", justify="right")
    if report.suggested_shares is not None:
        table.add_column("suggested", justify="right")
    for name, share in report.shares.items():
        cells = [f"{100 * share:.1f}"]
        if report.suggested_shares is not None:
            cells.append(f"{100 * report.suggested_shares[name]:.1f}")
        label = name.replace("_", " ")
        if name == "attention_hijack":
            label += " (of what the others keep)"
        table.add_row(label, *cells)
    console.print(table)
    if report.channels is not None:
        found = report.channels
        names = ", ".join(map(str, found.channels)) or "none"
        console.print(
            f"channels masked: {names}; cross-image cosine {found.cosines[0]:.3f}, then "
            f"{found.cosines[-1]:.3f}"
        )
    for advice in report.advice.values():
        console.print(f"- {escape(advice.text)}", soft_wrap=True)
    if report.flags:
        console.print("suggested:", " ".join(f"--set {escape(s)}" for s in report.flags),
                      soft_wrap=True)  # fmt: skip
    else:
        console.print("suggested: no change")
    console.print(f"{page}: the distributions ({seconds:.0f} s)", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
