"""The table of a sweep for people."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from trainer.ablate.table import SHOWN, Cell, Spread, Table, TableRow
from trainer.ablate.variants import FULL
from trainer.evaluate.intervals import Interval

_UNITS = {"percent": "%", "metres": "m"}
_NOTHING = "–"
_SPREADS: dict[Spread, str] = {
    "training seeds": "over training seeds, each the mean of its own probes or images: they hold "
    "what another training would change",
    "probe seeds": "over the probe seeds of a single run: they do not hold what another training "
    "seed would change (--seeds measures that)",
    "images": "over the images of a single run: they do not hold what another training seed would "
    "change",
}


class _Column(NamedTuple):
    measure: str
    score: str
    unit: str
    has_difference: bool

    @property
    def heads(self) -> list[str]:
        _, _, title = self.measure.partition(" ")
        unit = f" ({_UNITS[self.unit]})" if self.unit in _UNITS else ""
        own = f"{self.score}{unit}, {title}"
        return [own, "against full"] if self.has_difference else [own]


def as_markdown(table: Table) -> str:
    """The page: the table, what its rows are, what failed, how it was made."""
    columns = _columns(table)
    shown = [row for row in table.rows if row.status != "skipped"]
    head = ["row", *(name for column in columns for name in column.heads), "training (min)"]
    sections = [
        f"# Ablations of the recipe {table.recipe}",
        _aligned(head, [_line(row, columns) for row in shown]),
        _legend(table, columns),
        "## Rows",
        _aligned(
            ["row", "what it is", "change to the recipe"],
            [[row.name, row.about, f"`{row.changes}`" if row.changes else ""] for row in shown],
        ),
        *_reasons(table, "failed", "## Failed"),
        *_reasons(table, "skipped", "## Skipped"),
        "## How it was made",
        f"    {table.command}",
        _origin(table),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _columns(table: Table) -> list[_Column]:
    """Shown scores that some row has, the measures in the order of the command line."""
    found: dict[tuple[str, str], _Column] = {}
    for row in table.rows:
        for cell in row.cells:
            is_probe = not cell.measure.startswith("spurious ")
            column = _Column(cell.measure, cell.score, cell.unit, is_probe)
            found.setdefault((cell.measure, cell.score), column)
    order = list(dict.fromkeys(measure for measure, _ in found))
    return [
        found[measure, score]
        for measure in order
        for kind, scores in SHOWN.items()
        for score in scores
        if measure.startswith(f"{kind} ") and (measure, score) in found
    ]


def _line(row: TableRow, columns: Sequence[_Column]) -> list[str]:
    line = [row.name]
    missing = "failed" if row.status == "failed" else _NOTHING
    for column in columns:
        cell = _cell_of(row, column)
        line.append(missing if cell is None else _shown(cell.interval, cell.unit))
        if column.has_difference:
            difference = None if cell is None else cell.difference
            line.append(
                _NOTHING
                if cell is None or difference is None
                else _shown(difference, cell.unit, is_signed=True)
            )
    trained = _NOTHING if row.status != "failed" or columns else missing
    return [*line, trained if row.minutes is None else f"{row.minutes:.1f}"]


def _cell_of(row: TableRow, column: _Column) -> Cell | None:
    wanted = (column.measure, column.score)
    return next((cell for cell in row.cells if (cell.measure, cell.score) == wanted), None)


def _shown(interval: Interval, unit: str, *, is_signed: bool = False) -> str:
    digits = 2 if unit == "percent" else 4
    mean, low, high = interval.mean, interval.low, interval.high
    text = f"{mean:{'+' if is_signed else ''}.{digits}f}"
    if interval.count == 1:
        return text
    if math.isclose(high - mean, mean - low, rel_tol=1e-3, abs_tol=1e-9):
        return f"{text} ± {high - mean:.{digits}f}"
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _legend(table: Table, columns: Sequence[_Column]) -> str:
    cells = [cell for row in table.rows for column in columns if (cell := _cell_of(row, column))]
    if not cells:
        return "Nothing was measured yet."
    spreads: dict[Spread, dict[str, None]] = {}
    for cell in cells:
        spreads.setdefault(cell.spread, {})[cell.score] = None
    better = {cell.score: cell.better for cell in cells}
    ways = [
        f"{way} is better: {', '.join(name for name, is_so in better.items() if is_so == way)}"
        for way in ("higher", "lower")
        if way in better.values()
    ]
    lines = [
        _sentence("; ".join(ways)),
        *(
            _sentence(f"intervals of {', '.join(names)} are 95 %, {_SPREADS[spread]}")
            for spread, names in spreads.items()
            if spread in _SPREADS
        ),
    ]
    if any(cell.difference for cell in cells):
        lines.append(
            f"Differences are to the row {FULL}, seed by seed: what a seed does to both cancels."
        )
    if any(column.score == "FP or GP" for column in columns):
        lines.append("FP or GP: tokens that carry spurious patterns of the raw backbone.")
    if any(column.score.startswith("view retrieval") for column in columns):
        lines.append("View retrieval: tokens found again at their own place in another crop.")
    return "\n".join(lines)


def _reasons(table: Table, status: str, title: str) -> list[str]:
    lines = [
        # A step's title begins with the row's name already.
        f"- {reason}" if reason.startswith(f"{row.name} ") else f"- {row.name}: {reason}"
        for row in table.rows
        if row.status == status
        for reason in row.reasons
    ]
    return [title, "\n".join(lines)] if lines else []


def _origin(table: Table) -> str:
    seeds = ", ".join(map(str, table.training_seeds))
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    parts = [
        f"Training seeds: {seeds}; probes of each run: {table.probe_seeds}.",
        f"Measured {' to '.join(table.dates)}." if table.dates else "",
        f"Versions: {versions}." if versions else "",
    ]
    return " ".join(part for part in parts if part)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(head), *(list(line) for line in lines)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    rule = ["-" * width for width in widths]

    def joined(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([joined(rows[0]), joined(rule), *map(joined, rows[1:])])
