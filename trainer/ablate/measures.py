"""What every row of a sweep is measured by: data sets and photographs, with flags of their own.

measure("segmentation", "camvid --size 352 480")     # folder, and flags for `trainer.evaluate`
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.data import find_images
from trainer.errors import DataError

Kind = Literal["segmentation", "depth", "spurious"]
_FOLDER_FLAG = {"segmentation": "--data", "depth": "--data", "spurious": "--images"}
_SIZE_FLAGS = ("--size", "--short-side")
# What the sweep sets itself.
_TAKEN: tuple[str, ...] = (
    "--model",
    "--baseline",
    "--weights",
    "--random-weights",
    "--register-width",
    "--json",
    "--features",
    "--seeds",
    "--record",
    "--markdown",
    "--data",
    "--images",
    "--url",
)


@dataclass(frozen=True)
class Measure:
    """One evaluation of every row.

    Attributes:
        kind: Subcommand of `trainer.evaluate`.
        folder: Of the data set or the photographs.
        flags: For the subcommand, as the user gave them.
        title: What it is called in the table.
    """

    kind: Kind
    folder: Path
    flags: tuple[str, ...]
    title: str

    @property
    def is_probe(self) -> bool:
        """Whether probes are trained, by seeds of their own."""
        return self.kind != "spurious"

    def arguments(self, size: int) -> list[str]:
        """Subcommand, folder and flags.

        Args:
            size: Side of images in pixels, where the flags do not say it: the same for every row,
                whatever the sizes that backbones were trained at.
        """
        words = [self.kind, _FOLDER_FLAG[self.kind], str(self.folder), *self.flags]
        if not any(flag.partition("=")[0] in _SIZE_FLAGS for flag in self.flags):
            words += ["--size", *([str(size)] * (2 if self.is_probe else 1))]
        return words


def measure(kind: Kind, text: str) -> Measure:
    """Read `DIR`, or `DIR FLAG ...` in one argument.

    Raises:
        DataError: there is no such folder, or a flag is the sweep's own.
    """
    # A path with spaces is one as long as it exists.
    words = [text] if Path(text).exists() else _words(text)
    folder, flags = Path(words[0]), tuple(words[1:])
    # Photographs may be a list or a pattern of shards; who reads them refuses what is not there.
    if kind != "spurious" and not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; give one to --{_option(kind)}, and flags of python -m "
            f"trainer.evaluate {kind} behind it in the same quotes"
        )
    for flag in flags:
        if flag.partition("=")[0] in _TAKEN:
            instead = ", and give --probe-seeds to the sweep" if flag.startswith("--seeds") else ""
            raise DataError(
                f"--{_option(kind)} {text!r}: {flag} is set by the sweep; leave it out{instead}"
            )
    return Measure(kind, folder, flags, folder.resolve().name)


def all_measures(
    segmentation: Sequence[str], depth: Sequence[str], spurious: Sequence[str]
) -> tuple[Measure, ...]:
    """Those of the command line, in the order of the columns, each under a title of its own.

    Raises:
        DataError: see `measure`; or one is there twice.
    """
    found = [measure("segmentation", text) for text in segmentation]
    found += [measure("depth", text) for text in depth]
    found += [measure("spurious", text) for text in spurious]
    titled: list[Measure] = []
    for one in found:
        namesakes = [other for other in found if (other.kind, other.title) == (one.kind, one.title)]
        title = one.title
        if len(namesakes) > 1:
            # The same folder at two sizes, or two folders of the same name.
            if len({other.folder for other in namesakes}) > 1:
                title = "/".join(one.folder.resolve().parts[-2:])
            title = " ".join([title, *one.flags])
        if any((other.kind, other.title) == (one.kind, title) for other in titled):
            raise DataError(f"--{_option(one.kind)} {one.folder} is given twice; leave one out")
        titled.append(Measure(one.kind, one.folder, one.flags, title))
    return tuple(titled)


def check_measures(measures: Sequence[Measure], size: int) -> None:
    """Find, before anything is computed, what the evaluations would not take.

    Args:
        measures: Of the sweep.
        size: See `Measure.arguments`.

    Raises:
        RefineryError: a data set cannot be opened, or there are no images.
        SystemExit: flags that `trainer.evaluate` does not have; it has said so.
    """
    # Here: a sweep that measures nothing needs none of it.
    from trainer.evaluate.__main__ import parser
    from trainer.evaluate.datasets import open_depth, open_segmentation

    for one in measures:
        arguments = parser().parse_args([*one.arguments(size), "--model", "MODEL"])
        if one.kind == "segmentation":
            open_segmentation(one.folder, arguments.layout)
        elif one.kind == "depth":
            open_depth(one.folder, arguments.layout)
        else:
            find_images(one.folder, seed=arguments.seed, max_images=arguments.num_images)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text) or [text]
    except ValueError as error:
        raise DataError(f"{text!r} cannot be split into words: {error}") from error


def _option(kind: Kind) -> str:
    return "spurious-images" if kind == "spurious" else kind
