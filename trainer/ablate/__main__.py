"""python -m trainer.ablate: the paper's ablations as one sweep that goes on where it stopped.

python -m trainer.ablate --recipe demo --list
python -m trainer.ablate --recipe demo --images PHOTOS --output runs/ablations --segmentation CAMVID
"""

import argparse
import json
import logging
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from backbone.errors import RefineryError
from trainer.ablate.children import Children, Runner
from trainer.ablate.markdown import as_markdown
from trainer.ablate.measures import all_measures, check_measures
from trainer.ablate.plan import Plan, SweepSettings, check_runs, make_plan
from trainer.ablate.resolve import RecipeSource, ResolvedVariant, choose_variants, resolve
from trainer.ablate.sweep import Outcome, carry_out, only_one
from trainer.ablate.table import make_table
from trainer.ablate.variants import VARIANTS
from trainer.evaluate.record import write_text

_EXIT_USER_ERROR = 2

_NAMES = ", ".join(["full", *(variant.name for variant in VARIANTS)])
_EPILOG = f"""\
{textwrap.fill(f"variants: {_NAMES}, served-width-N", 100)}
--list says what each is on a recipe; served-width-N is the full run, measured with a border of N
patches. `full` is always there, and the raw backbone is measured beside it.

examples:
  python -m trainer.ablate --recipe siglip2-so400m --list
  python -m trainer.ablate --recipe demo --images PHOTOS --output runs/ablations --dry-run \\
      --segmentation "CAMVID --size 352 480" --spurious-images PHOTOS
  python -m trainer.ablate --recipe demo --images PHOTOS --output runs/ablations \\
      --variants no-uni,no-spu,served-width-2 --variant hot:loss.temperature=0.5 \\
      --segmentation "CAMVID --size 352 480" --seeds 3

The same command goes on where it stopped: finished runs and measurements stay, a stopped run is
resumed. A run that was made with another recipe, other images or other settings is refused.
OUTPUT/table.md and OUTPUT/table.json have what there is after every step.
Exit codes: 0 done; 1 done, but something failed (a row of the table says what); 2 a mistake that
the message names; 75 stopped by SIGTERM, 130 by Ctrl-C.
"""


def main(argv: Sequence[str] | None = None, *, runner: Runner | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: Arguments.
        runner: Carries out the commands of the sweep; default processes.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        source = RecipeSource(options.recipe, _settings(options))
        source.check_backbone()
        rows = resolve(choose_variants(options.variants, options.custom, source), source)
        if options.list:
            _write(_listing(rows))
            return 0
        if options.images is None or options.output is None:
            parser.error("--images and --output are needed")
        plan = _plan(options, source, rows)
        if options.dry_run:
            _write(_description(plan))
            return 0
        command = shlex.join(["python", "-m", "trainer.ablate", *argv])
        with only_one(plan.settings.output) as lock:
            if runner is not None:
                return _sweep(plan, runner, command)
            with Children([lock]) as children:
                return _sweep(plan, children, command)
    except RefineryError as error:
        console = Console(stderr=True)
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return _EXIT_USER_ERROR


def _plan(
    options: argparse.Namespace, source: RecipeSource, rows: Sequence[ResolvedVariant]
) -> Plan:
    measures = all_measures(options.segmentation, options.depth, options.spurious)
    check_measures(measures, source.size)
    settings = SweepSettings(
        source=source,
        images=options.images,
        output=options.output,
        num_seeds=options.seeds,
        num_probe_seeds=options.probe_seeds,
        measures=measures,
        device=options.device,
        skip_bad_images=options.skip_bad_images,
        features=options.features,
    )
    plan = make_plan(settings, rows)
    check_runs(plan)
    return plan


def _sweep(plan: Plan, runner: Runner, command: str) -> int:
    def show(outcome: Outcome) -> None:
        table = make_table(plan, outcome, command=command)
        write_text(plan.settings.output / "table.json", table.model_dump_json(indent=2) + "\n")
        write_text(plan.settings.output / "table.md", as_markdown(table))

    outcome = carry_out(plan, runner, tell=_tell, show=show)
    if outcome.exit_code > 1:
        _tell("stopped: the same command goes on from here")
    else:
        _write(as_markdown(make_table(plan, outcome, command=command)))
    _tell(f"table: {plan.settings.output / 'table.md'}")
    return outcome.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.ablate",
        description="Train a recipe and its ablations one after the other, measure them and the "
        "raw backbone, and put them into one table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", default="paper", metavar="NAME|FILE", help="what is ablated (default: paper)")
    add("--backbone", metavar="NAME|PATH", help="timm name or model folder; sets backbone.name")
    add("--images", metavar="DIR|FILE", help="training images, as for python -m trainer")
    add("--output", type=Path, metavar="DIR", help="folder of the sweep, made if missing")
    add("--variants", metavar="A,B,C", help="only these beside full (default: all)")
    add(
        "--variant",
        action="append",
        default=[],
        dest="custom",
        metavar="NAME:SECTION.KEY=VALUE,...",
        help="a variant of your own; may be repeated",
    )
    add(
        "--seeds", type=_count, default=1, help="runs of each variant, from run.seed on (default 1)"
    )
    add("--probe-seeds", type=_count, default=3, help="probes of each run (default 3)")
    for name, what in (("segmentation", "labelled"), ("depth", "measured")):
        add(
            f"--{name}",
            action="append",
            default=[],
            metavar="DIR",
            help=f"a {what} data set for python -m trainer.evaluate {name}; flags for it may "
            'follow in the same quotes, as in "DIR --short-side 448"; may be repeated',
        )
    add(
        "--spurious-images",
        action="append",
        default=[],
        dest="spurious",
        metavar="DIR|FILE",
        help="photographs for python -m trainer.evaluate spurious, in the same way",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value of the recipe for every row; may be repeated",
    )
    add("--max-steps", type=_count, help="optimiser steps of a run at most; sets run.max_steps")
    add("--skip-bad-images", action="store_true", help="as for python -m trainer")
    add("--device", metavar="auto|cpu|cuda[:N]", help="of training and evaluation (default: auto)")
    add(
        "--features",
        metavar="DIR|none",
        help="where probes keep features (default: in OUTPUT, a row's removed when it is measured)",
    )
    add("--list", action="store_true", help="say what each variant is on the recipe, and exit")
    add("--dry-run", action="store_true", help="say what would be done, and exit")
    return parser


def _settings(options: argparse.Namespace) -> tuple[str, ...]:
    settings: list[str] = list(options.set)
    if options.backbone is not None:
        settings.append(f"backbone.name={json.dumps(options.backbone)}")
    if options.max_steps is not None:
        settings.append(f"run.max_steps={options.max_steps}")
    return tuple(settings)


def _listing(rows: Sequence[ResolvedVariant]) -> str:
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.name:<{width}}  {row.variant.about}")
        if row.changes:
            lines.append(f"{'':<{width}}    {row.changes}")
        if row.skipped:
            lines.append(f"{'':<{width}}    skipped: {row.skipped}")
    return "\n".join(lines) + "\n"


def _description(plan: Plan) -> str:
    """What a sweep would do, step by step."""
    trainings = [step for step in plan.steps if step.kind == "training"]
    evaluations = [step for step in plan.steps if step.kind == "evaluation"]
    skipped = [row for row in plan.rows if row.skipped]
    finished = [step for step in plan.steps if step.is_finished()]
    lines = [
        f"{len(trainings)} training runs and {len(evaluations)} evaluations, "
        f"{len(finished)} of these {len(plan.steps)} steps finished already; "
        f"{len(skipped)} variants skipped",
        "",
        *(f"{'done' if step.is_finished() else 'to do':<7}{step.title}" for step in plan.steps),
        *(f"{'skip':<7}{row.name}: {row.skipped}" for row in skipped),
    ]
    return "\n".join(lines) + "\n"


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(text)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
