"""The one form of every evaluation's result: JSON for programs, Markdown for people.

result = new_result(task="segmentation", dataset="camvid", rows=rows, ...)
write(result, json_path=Path("camvid.json"), markdown_path=Path("camvid.md"))
"""

from __future__ import annotations

import datetime
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from trainer.evaluate.errors import EvaluationError, first_fault
from trainer.evaluate.files import replace_file
from trainer.evaluate.intervals import Interval, over_seeds

Task = Literal["segmentation", "depth", "zeroshot", "spurious"]
Unit = Literal["percent", "metres", "ratio", ""]
_DISTRIBUTIONS = ("vit-refinery", "torch", "timm", "torchmetrics", "pillow", "numpy")
_MINUS = " minus "
_TITLES = {
    "segmentation": "Segmentation",
    "depth": "Depth",
    "zeroshot": "Zero-shot segmentation",
    "spurious": "Spurious tokens",
}
CLASS_IOU = "class_iou"
"""Key of `Row.details`: class name to IoU in percent, a mean over seeds; null where absent."""

MEAN = "mean"
"""Name of a score that is the mean over several data sets."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Score(_Frozen):
    """One number of a row, with its interval.

    Attributes:
        name: As in the table's head, "mIoU".
        unit: Percentages are 0 to 100.
        better: Which way is better.
        interval: Over seeds or images; 95 %.
        values: Per seed, or what the interval is over.
    """

    name: str
    unit: Unit = ""
    better: Literal["higher", "lower"]
    interval: Interval
    values: tuple[float, ...]


class Row(_Frozen):
    """The scores of one subject, or the differences of two.

    Attributes:
        subject: "raw", "refined", or what else stands before the row.
        spec: Where it is from: path, name or URL.
        digest: SHA-256 of its weights; of a difference empty.
        scores: The same ones in every row.
        details: What does not fit a table, as `CLASS_IOU`.
    """

    subject: str
    spec: str = ""
    digest: str = ""
    scores: tuple[Score, ...]
    details: dict[str, JsonValue] = {}


class Result(_Frozen):
    """What was measured, and how.

    Attributes:
        dataset: Name of the data set.
        protocol: One sentence that says how it was measured, with the source.
        settings: All that decides the scores, beside the subjects.
        rows: Raw first, then refined, then differences.
        seconds: The evaluation took.
        command: That measured it.
        versions: Of the distributions that decide the scores.
        date: ISO 8601, UTC.
    """

    schema_version: Literal[1] = 1
    task: Task
    dataset: str
    protocol: str
    settings: dict[str, JsonValue]
    rows: tuple[Row, ...]
    seconds: float
    command: str
    versions: dict[str, str]
    date: str


def score(
    name: str, values: Sequence[float], *, better: Literal["higher", "lower"], unit: Unit = ""
) -> Score:
    """A score of a value per seed, with the interval of `over_seeds`."""
    return Score(
        name=name, unit=unit, better=better, interval=over_seeds(values), values=tuple(values)
    )


def new_result(
    *,
    task: Task,
    dataset: str,
    protocol: str,
    settings: Mapping[str, JsonValue],
    rows: Sequence[Row],
    seconds: float,
) -> Result:
    """A result of now and of this command, its rows followed by refined minus raw."""
    return Result(
        task=task,
        dataset=dataset,
        protocol=protocol,
        settings=dict(settings),
        rows=with_differences(rows),
        seconds=round(seconds, 3),
        command=shlex.join(["python", "-m", "trainer.evaluate", *sys.argv[1:]]),
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def with_differences(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows, and after them every later one minus the first, seed by seed.

    The same seed draws the same probe for every subject, so much of what varies from seed to seed
    cancels: the interval of the difference says more than two intervals side by side.
    """
    has_some = any(_MINUS in row.subject for row in rows)  # by an evaluation that knows better
    is_paired = all(score.values for row in rows for score in row.scores)
    if has_some or not is_paired:
        return tuple(rows)
    return (*rows, *(_difference(rows[0], row) for row in rows[1:]))


def _difference(first: Row, second: Row) -> Row:
    scores = []
    for before, after in zip(first.scores, second.scores, strict=True):
        if before.name != after.name or len(before.values) != len(after.values):
            raise ValueError(f"{before.name} and {after.name} of two rows cannot be compared")
        changes = [b - a for a, b in zip(before.values, after.values, strict=True)]
        scores.append(score(after.name, changes, better=after.better, unit=after.unit))
    return Row(subject=second.subject + _MINUS + first.subject, scores=tuple(scores))


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read(path: Path) -> Result:
    """The result that a JSON file holds.

    Raises:
        EvaluationError: it cannot be read, or holds something else.
    """
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}); give a file that "
            "python -m trainer.evaluate wrote with --json"
        ) from error
    except ValidationError as error:
        raise EvaluationError(
            f"{path} is not the result of an evaluation ({first_fault(error)}); give a file "
            "that python -m trainer.evaluate wrote with --json"
        ) from error


def write(result: Result, json_path: Path | None = None, markdown_path: Path | None = None) -> None:
    """Write a result; a file that is there is replaced at once.

    Raises:
        EvaluationError: a file cannot be written.
    """
    if json_path is not None:
        _replace(json_path, result.model_dump_json(indent=2) + "\n")
    if markdown_path is not None:
        _replace(markdown_path, markdown(result))


def _replace(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror}); choose another file"
        ) from error


def markdown(result: Result) -> str:
    """A result as a section of a Markdown page: scores, what they mean, how they were measured."""
    settings = ", ".join(
        f"{name.replace('_', ' ')} {_shown(value)}"
        for name, value in result.settings.items()
        if value is not None
    )
    subjects = [
        f"- {row.subject}: `{row.spec}`" + (f", weights {row.digest[:12]}" if row.digest else "")
        for row in result.rows
        if row.spec
    ]
    lines = [
        f"### {_TITLES[result.task]} on {result.dataset}",
        "",
        table(result),
        _legend(result),
        "",
        result.protocol + (f" Settings: {settings}." if settings else ""),
        "",
        *subjects,
        "",
        f"Measured on {result.date[:10]} in {result.seconds:.0f} s by",
        "",
        f"    {result.command}",
    ]
    return "\n".join(lines) + "\n"


def table(result: Result) -> str:
    """The rows of a result as a Markdown table, its columns aligned for a terminal too."""
    units = {"percent": " (%)", "metres": " (m)", "ratio": "", "": ""}
    head = ["", *(f"{each.name}{units[each.unit]}" for each in result.rows[0].scores)]
    lines = [
        [row.subject, *(_cell(each, is_signed=_MINUS in row.subject) for each in row.scores)]
        for row in result.rows
    ]
    return _aligned(head, lines)


def class_table(result: Result) -> str:
    """IoU in percent of every class, the subjects side by side; empty without classes."""
    columns = {
        row.subject: found
        for row in result.rows
        if isinstance(found := row.details.get(CLASS_IOU), dict)
    }
    if not columns:
        return ""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [
        [name, *(_class_cell(column.get(name)) for column in columns.values())] for name in names
    ]
    return _aligned(["IoU (%)", *columns], lines)


def _class_cell(value: JsonValue) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "absent"


def _cell(found: Score, *, is_signed: bool) -> str:
    digits = 2 if found.unit == "percent" else 4
    mean, low, high = found.interval.mean, found.interval.low, found.interval.high
    text = f"{mean:{'+' if is_signed else ''}.{digits}f}"
    if found.interval.count == 1:
        return text
    if math.isclose(high - mean, mean - low, rel_tol=1e-3, abs_tol=1e-9):
        return f"{text} ± {high - mean:.{digits}f}"
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _legend(result: Result) -> str:
    scores = result.rows[0].scores
    parts = [
        f"{way} is better: " + ", ".join(each.name for each in scores if each.better == way)
        for way in ("higher", "lower")
        if any(each.better == way for each in scores)
    ]
    counts = sorted({each.interval.count for row in result.rows for each in row.scores})
    if counts != [1]:
        parts.append(
            "intervals are 95 % confidence intervals over "
            + " or ".join(f"{count}" for count in counts)
            + (" seeds" if result.task in ("segmentation", "depth") else " images")
        )
    text = "; ".join(parts) + "."
    return text[:1].upper() + text[1:]


def _shown(value: JsonValue) -> str:
    if isinstance(value, list):
        is_size = len(value) == 2 and all(isinstance(each, int) and each > 9 for each in value)
        return ("x" if is_size else " ").join(_shown(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    widths = [max(3, width) for width in widths]

    def joined(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(
        ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    )
    return "\n".join([joined(head), rule + "|", *(joined(line) for line in lines)]) + "\n"
