"""Arguments that subcommands share, and what they do with a result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backbone import is_artifact
from trainer.evaluate import images
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import ShortSide, Size
from trainer.evaluate.record import record
from trainer.evaluate.results import Result, table, write
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_FEATURES = "runs/features"
_SEEDS = 3


def add_data_arguments(parser: argparse.ArgumentParser, layouts: Mapping[str, str]) -> None:
    """What data, and in which layout."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, required=True, metavar="DIR", help="of the data set")
    group.add_argument(
        "--layout",
        choices=("auto", *(name for name in layouts if name != "auto")),
        default="auto",
        metavar="NAME",
        help="how the folder is laid out (default: what is found there); "
        + "; ".join(f"{name}: {text}" for name, text in layouts.items()),
    )


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """How large images are encoded, and where features are kept."""
    group = parser.add_argument_group("features")
    sizes = group.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="all images at this size in pixels, whole patches; default the model's own",
    )
    sizes.add_argument(
        "--short-side",
        type=int,
        metavar="S",
        help="aspect kept: the short side in pixels, then whole patches of each backbone",
    )
    group.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("SIZE", "STRIDE"),
        help="encode by square windows, in pixels; tokens are averaged where they overlap",
    )
    group.add_argument(
        "--features",
        default=_FEATURES,
        metavar="DIR|none",
        help="where features are kept, to be found again by a run that goes on or that asks for "
        "the same; none: in memory. An image takes 2 * (H / patch) * (W / patch) * channels bytes "
        "for each backbone: 0.5 MB at 352x480 px with 16 px patches and 384 channels, so 0.7 GB "
        f"for two backbones on 700 images (default {_FEATURES})",
    )
    group.add_argument(
        "--batch-size", type=positive, default=16, metavar="B", help="images encoded at once"
    )


def add_probe_arguments(
    parser: argparse.ArgumentParser, *, steps: int, rates: Sequence[float], normalization: str
) -> None:
    """How probes are trained; the values are the defaults."""
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--seeds",
        type=positive,
        default=_SEEDS,
        metavar="N",
        help=f"probes with the seeds 0 to N - 1; intervals need 2 (default {_SEEDS})",
    )
    group.add_argument(
        "--steps",
        type=positive,
        default=steps,
        metavar="N",
        help=f"optimiser steps (default {steps})",
    )
    group.add_argument(
        "--learning-rates",
        type=_rate,
        nargs="+",
        default=tuple(rates),
        metavar="LR",
        help="a head each, the best counts (default " + " ".join(f"{r:g}" for r in rates) + ")",
    )
    group.add_argument(
        "--normalization",
        choices=("batch", "whitening"),
        default=normalization,
        help="of tokens before the linear layer; whitening gets there in fewer steps "
        f"(default {normalization})",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    group = parser.add_argument_group("result")
    group.add_argument("--json", type=Path, metavar="FILE", help="write it for programs")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write it for people")
    group.add_argument(
        "--record",
        action="store_true",
        help="write it into the artifact --model: its refinery.json and README.md; it replaces "
        "what is recorded there of the same task, data set and size, also if that was measured "
        "with other settings, and a log line says what it replaced",
    )


def check_output(arguments: argparse.Namespace) -> None:
    """
    Raises:
        EvaluationError: the result could not be put where it was asked for; said before anything
            is computed.
    """
    if arguments.record and arguments.url is not None:
        raise EvaluationError(
            "--record writes into an artifact's folder, and --url measures models of a service; "
            "leave --record out, or measure the folder itself"
        )
    if arguments.record and not (arguments.model and is_artifact(arguments.model)):
        raise EvaluationError(
            f"--record writes into an artifact, and {arguments.model} is none; leave --record out, "
            "or give the folder that python -m trainer wrote"
        )
    for path in (arguments.json, arguments.markdown):
        if path is not None and path.is_dir():
            raise EvaluationError(f"{path} is a folder; give the name of a file")


def chosen_size(arguments: argparse.Namespace, subjects: Sequence[Subject]) -> Size:
    """The size of the arguments, or the last subject's own.

    Raises:
        EvaluationError: a subject cannot have it.
    """
    size: Size = subjects[-1].native_size
    if arguments.size is not None:
        height, width = arguments.size
        size = (height, width)
    elif arguments.short_side is not None:
        size = ShortSide(arguments.short_side)
    for subject in subjects:
        images.check_size(size, subject.patch_size, subject.name)
    return size


def chosen_windows(arguments: argparse.Namespace, subjects: Sequence[Subject]) -> Windows | None:
    """The windows of the arguments.

    Raises:
        EvaluationError: a subject cannot have them.
    """
    if arguments.window is None:
        return None
    windows = Windows(*arguments.window)
    for subject in subjects:
        windows.check(subject.patch_size)
    return windows


def chosen_store(arguments: argparse.Namespace) -> FeatureStore:
    """Where features go.

    Raises:
        EvaluationError: it is a file.
    """
    if arguments.features == "none":
        return FeatureStore(None)
    folder = Path(arguments.features)
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"--features {folder} is a file; give a folder, or none")
    return FeatureStore(folder)


def publish(result: Result, arguments: argparse.Namespace) -> None:
    """Print the table, and write what was asked for.

    Raises:
        RefineryError: something cannot be written.
    """
    sys.stdout.write(f"{result.dataset}\n\n{table(result)}")
    write(result, arguments.json, arguments.markdown)
    if arguments.record:
        record(Path(arguments.model), result)


def positive(text: str) -> int:
    """The type of arguments that are counts, of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no learning rate; give a number above 0")
    return number
