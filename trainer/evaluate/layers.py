"""Shares of spurious tokens and of outlying norms, block by block.

Every block is compared with the patterns of the same block, under thresholds of its own where they
follow from the raw backbone's scores. Blocks pass through the final norm first where the dense
features do, as one forward gives them; norms are taken before it.
"""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from trainer.evaluate.results import Result, Row, Score

BY_LAYER = "by_layer"
"""Key of `Row.details`: a mapping per block, its number as `layer`, the other values by the name of
the score, means over images."""

OWN = "own "
"""Before the names of shares by a subject's own patterns."""
PEAK = "norm max/median"
_SHOWN = ("FP", "GP", f"{OWN}FP", f"{OWN}GP", "norm outliers", PEAK)
_SIGNED = " minus "


def layer_rows(columns: Mapping[str, Sequence[float]]) -> list[JsonValue]:
    """What goes into `Row.details`, of the values of every block by the name of the score."""
    depth = len(next(iter(columns.values())))
    return [
        {"layer": layer, **{name: round(values[layer], 4) for name, values in columns.items()}}
        for layer in range(depth)
    ]


def layer_table(result: Result) -> str:
    """A Markdown table with a line per block, subjects side by side; empty without layers."""
    columns: dict[str, list[str]] = {}
    for number, row in enumerate(result.rows):
        entries = row.details.get(BY_LAYER)
        if not isinstance(entries, list):
            continue
        blocks = [entry for entry in entries if isinstance(entry, dict)]
        columns["block"] = [str(block["layer"]) for block in blocks]
        for name in _SHOWN:
            # The first one's patterns are its own.
            if name in blocks[0] and not (number == 0 and name.startswith(OWN)):
                columns[f"{row.subject} {name}"] = [_number(block[name]) for block in blocks]
    return _table(list(columns), list(zip(*columns.values(), strict=True))) if columns else ""


def score_table(result: Result) -> str:
    """The scores of a result in lines and its rows in columns: there are many scores, few rows."""
    names = [score.name for score in result.rows[0].scores]
    lines = []
    for index, name in enumerate(names):
        unit = " (%)" if result.rows[0].scores[index].unit == "percent" else ""
        lines.append([name + unit, *(_cell(row, row.scores[index]) for row in result.rows)])
    return _table(["", *(row.subject for row in result.rows)], lines)


def _cell(row: Row, score: Score) -> str:
    digits = 1 if score.unit == "percent" else 3
    sign = "+" if _SIGNED in row.subject else ""
    mean, low, high = score.interval.mean, score.interval.low, score.interval.high
    if score.interval.count == 1:
        return f"{mean:{sign}.{digits}f}"
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _number(value: JsonValue) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *(len(line[at]) for line in (head, *lines))) for at in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(joined, [head, rule, *lines])) + "\n"
