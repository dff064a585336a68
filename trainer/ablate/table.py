"""The table of a sweep, from the results that are there: OUTPUT/table.md and OUTPUT/table.json."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trainer.ablate.measures import Kind
from trainer.ablate.plan import Plan, Step
from trainer.ablate.record import read_result
from trainer.ablate.resolve import ResolvedVariant
from trainer.ablate.sweep import Failure, Outcome, training_seconds
from trainer.ablate.variants import FULL, RAW
from trainer.evaluate import results
from trainer.evaluate.intervals import Interval, over_seeds

Status = Literal["done", "failed", "skipped", "not yet"]
Spread = Literal["training seeds", "probe seeds", "images", "none"]

# Scores that get a column, of each kind; table.json has the others too.
SHOWN: dict[Kind, tuple[str, ...]] = {
    "segmentation": ("mIoU",),
    "depth": ("RMSE",),
    "spurious": ("FP or GP", "view retrieval (shift)", "view retrieval (zoom)"),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Frozen):
    """One score of a row.

    Attributes:
        measure: `KIND TITLE`.
        score: Its name in the results.
        unit, better: As in the results.
        interval: 95 %, over `spread`.
        spread: What the interval is over: runs that differ in their training seed, each the mean of
            its own values; or the probe seeds, or the images, of a single run.
        values: Of each training seed, per probe seed or image.
        difference: To the full run, value by value; None for the full run, and without one.
    """

    measure: str
    score: str
    unit: str
    better: str
    interval: Interval
    spread: Spread
    values: dict[int, tuple[float, ...]]
    difference: Interval | None = None


class TableRow(_Frozen):
    """A variant and what it came to.

    Attributes:
        name, about: Of the variant.
        changes: What it does to the recipe.
        status: `not yet` while something is missing that did not fail.
        reasons: Why it failed, or was skipped.
        minutes: Of training, a mean over seeds; None where nothing was trained.
    """

    name: str
    about: str
    changes: str = ""
    status: Status
    reasons: tuple[str, ...] = ()
    minutes: float | None = None
    cells: tuple[Cell, ...] = ()


class Table(_Frozen):
    """All rows, the raw backbone's first.

    Attributes:
        recipe: Name of the recipe.
        training_seeds, probe_seeds: Their numbers.
        command: That made the sweep, without the folders of one machine.
        versions: Of what measured.
        dates: The first and the last of the measurements; empty without any.
    """

    schema_version: Literal[1] = 1
    recipe: str
    training_seeds: tuple[int, ...]
    probe_seeds: int
    command: str
    versions: dict[str, str]
    dates: tuple[str, ...]
    rows: tuple[TableRow, ...]


def make_table(plan: Plan, outcome: Outcome, *, command: str) -> Table:
    """Read what a sweep has come to; works at any time of it."""
    found = {
        step.product: read_result(step.product, step.needs) for step in plan.steps if step.needs
    }
    read = {path: result for path, result in found.items() if result is not None}
    full = _cells(plan.of(FULL), read, "refined")
    rows = [_raw_row(plan, outcome, read, full)]
    rows += [_row(plan, each, outcome, read, full) for each in plan.rows]
    dates = sorted(result.date[:10] for result in read.values())
    versions: dict[str, str] = {}
    for result in read.values():
        for name, version in result.versions.items():
            if version not in versions.setdefault(name, version).split(" and "):
                versions[name] += f" and {version}"
    return Table(
        recipe=plan.settings.source.full.name,
        training_seeds=tuple(plan.settings.seeds),
        probe_seeds=plan.settings.num_probe_seeds,
        command=without_folders(command),
        versions=versions,
        dates=tuple(dict.fromkeys([dates[0], dates[-1]])) if dates else (),
        rows=tuple(rows),
    )


def without_folders(text: str) -> str:
    """A command with only the last part of absolute paths: others lie elsewhere anyway."""
    return re.sub(r"(?<![\w.~/-])/(?:[^\s/'\",]+/)+", "", text)


Results = dict[Path, results.Result]


def _raw_row(plan: Plan, outcome: Outcome, read: Results, full: Sequence[Cell]) -> TableRow:
    first = [step for step in plan.of(FULL) if step.seed == plan.settings.seeds[0]]
    cells = [_compared(cell, full, is_raw=True) for cell in _cells(first, read, RAW)]
    measured = {cell.measure for cell in cells}
    status: Status = "not yet"
    if measured == {_title(step) for step in first if step.kind == "evaluation"}:
        status = "done"
    elif FULL in outcome.failures:
        status = "failed"
    return TableRow(
        name=RAW,
        about="the backbone before refining",
        status=status,
        reasons=(f"measured beside {first[0].title.rpartition(' ')[0]}, see there",)
        if status == "failed"
        else (),
        cells=tuple(cells),
    )


def _row(
    plan: Plan, each: ResolvedVariant, outcome: Outcome, read: Results, full: Sequence[Cell]
) -> TableRow:
    steps = plan.of(each.name)
    failures = outcome.failures.get(each.name, [])
    cells = _cells(steps, read, "refined")
    if each.name != FULL:
        cells = [_compared(cell, full) for cell in cells]
    status: Status = "done" if all(step.is_finished() for step in steps) else "not yet"
    if each.skipped:
        status = "skipped"
    elif failures:
        status = "failed"
    minutes = [
        training_seconds(step) / 60
        for step in steps
        if step.kind == "training" and step.is_finished()
    ]
    return TableRow(
        name=each.name,
        about=each.variant.about,
        changes=each.changes,
        status=status,
        reasons=(each.skipped,) if each.skipped else _reasons(failures, plan.settings.output),
        minutes=sum(minutes) / len(minutes) if minutes else None,
        cells=tuple(cells),
    )


def _reasons(failures: Sequence[Failure], output: Path) -> tuple[str, ...]:
    reasons = []
    for failure in failures:
        log = "" if failure.log is None else f"; log {failure.log.relative_to(output)}"
        reasons.append(f"{failure.title}: {without_folders(failure.reason)}{log}")
    return tuple(reasons)


def _cells(steps: Sequence[Step], read: Results, subject: str) -> list[Cell]:
    """Every score of a row, over its training seeds."""
    gathered: dict[tuple[str, str], list[tuple[int, results.Score]]] = {}
    for step in steps:
        if step.product not in read:
            continue
        for row in read[step.product].rows:
            if row.subject == subject:
                for score in row.scores:
                    gathered.setdefault((_title(step), score.name), []).append((step.seed, score))
    return [
        _cell(measure, scores, is_probe=not measure.startswith("spurious"))
        for (measure, _), scores in gathered.items()
    ]


def _cell(measure: str, scores: Sequence[tuple[int, results.Score]], *, is_probe: bool) -> Cell:
    first = scores[0][1]
    spread: Spread
    if len(scores) > 1:
        # Probes of one run are not independent of each other: each run counts once.
        spread, interval = "training seeds", over_seeds([s.interval.mean for _, s in scores])
    else:
        interval = first.interval
        spread = "none" if interval.count == 1 else "probe seeds" if is_probe else "images"
    return Cell(
        measure=measure,
        score=first.name,
        unit=first.unit,
        better=first.better,
        interval=interval,
        spread=spread,
        values={seed: score.values for seed, score in scores},
    )


def _compared(cell: Cell, full: Sequence[Cell], *, is_raw: bool = False) -> Cell:
    """A cell with its difference to the full run's, whose seeds are the same."""
    key = (cell.measure, cell.score)
    other = next((each for each in full if (each.measure, each.score) == key), None)
    if other is None:
        return cell
    pairs = list(_pairs(cell, other, is_raw=is_raw))
    if not pairs:
        return cell
    changes = [
        [value - reference for value, reference in zip(ours, theirs, strict=True)]
        for ours, theirs in pairs
    ]
    means = [sum(change) / len(change) for change in changes]
    return cell.model_copy(
        update={"difference": over_seeds(means if len(means) > 1 else changes[0])}
    )


def _pairs(
    cell: Cell, other: Cell, *, is_raw: bool
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Values of both, training seed by training seed; the raw backbone has one for all of them."""
    for seed, theirs in other.values.items():
        ours = next(iter(cell.values.values())) if is_raw else cell.values.get(seed)
        if ours is not None and len(ours) == len(theirs) > 0:
            yield ours, theirs


def _title(step: Step) -> str:
    assert step.measure is not None
    return f"{step.measure.kind} {step.measure.title}"
