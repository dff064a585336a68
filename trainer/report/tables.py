"""Results and sweeps as tables, with small charts of the intervals."""

import json
from collections.abc import Sequence
from html import escape

from pydantic import JsonValue

from trainer.evaluate.intervals import Interval
from trainer.evaluate.results import CLASS_IOU, Result, Row, Score
from trainer.report import charts
from trainer.report.inputs import Given
from trainer.report.verdict import DIFFERENCE, plain_rows

_UNITS = {"percent": "%", "metres": "m", "ratio": "", "": ""}
_TASKS = {
    "segmentation": "Semantic segmentation, linear probe",
    "depth": "Depth, linear probe",
    "zeroshot": "Zero-shot segmentation",
    "spurious": "Spurious tokens and consistency",
}
_MOST_COLUMNS = 6
_DIGITS = {"percent": 2, "metres": 3, "ratio": 3, "": 4}


def number(value: float, unit: str, *, signed: bool = False) -> str:
    """A value in digits that suit its unit, with a true minus."""
    return f"{value:{'+' if signed else ''}.{_DIGITS.get(unit, 4)}f}".replace("-", "\N{MINUS SIGN}")


def unit_sign(unit: str) -> str:
    """What stands behind a value."""
    return _UNITS.get(unit, unit)


def result(given: Given) -> str:
    """A result as a part of the page."""
    one = given.result
    notes = "".join(f'<p class="warning">{escape(text)}</p>' for text in given.warnings)
    return (
        f"<article><h3>{escape(one.dataset)}</h3>"
        f'<p class="kind">{escape(_TASKS.get(one.task, one.task))}</p>{notes}'
        f'<div class="beside">{_scores(one.rows)}{_charts(one)}</div>'
        f'<p class="note">{escape(one.protocol)}</p>{_classes(one)}'
        f"<details><summary>How it was measured</summary>{_settings(given)}</details></article>"
    )


def table(head: str, rows: Sequence[str]) -> str:
    """Rows under a head; it scrolls by itself where the page is too narrow."""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _scores(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = [f"{escape(one.name)}{_in_unit(one)}" for one in rows[0].scores]
    subjects = [escape(row.subject) for row in rows]
    cells = [[_value(one, signed=DIFFERENCE in row.subject) for one in row.scores] for row in rows]
    kinds = ["difference" if DIFFERENCE in row.subject else "" for row in rows]
    if len(names) > _MOST_COLUMNS:  # a score per line, so that nobody has to scroll sideways
        columns = list(zip(*cells, strict=True))
        return _grid(names, subjects, columns, row_kinds=[""] * len(names), column_kinds=kinds)
    return _grid(subjects, names, cells, row_kinds=kinds, column_kinds=[""] * len(names))


def _grid(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    *,
    row_kinds: Sequence[str],
    column_kinds: Sequence[str],
) -> str:
    head = "<th></th>" + "".join(f'<th class="number">{title}</th>' for title in columns)
    lines = []
    for title, row_kind, values in zip(rows, row_kinds, cells, strict=True):
        tds = "".join(
            f'<td class="number {kind}">{value}</td>'
            for kind, value in zip(column_kinds, values, strict=True)
        )
        lines.append(f'<tr class="{row_kind}"><th>{title}</th>{tds}</tr>')
    return table(head, lines)


def _in_unit(score: Score) -> str:
    sign = unit_sign(score.unit)
    arrow = "\N{UPWARDS ARROW}" if score.better == "higher" else "\N{DOWNWARDS ARROW}"
    told = f'<span class="arrow" title="{score.better} is better">{arrow}</span>'
    return f", {escape(sign)} {told}" if sign else f" {told}"


def _value(score: Score, *, signed: bool) -> str:
    return estimate(score.interval, score.unit, signed=signed)


def estimate(interval: Interval, unit: str, *, signed: bool = False, after: str = "") -> str:
    """A mean with `after` behind it, and below it its interval where there is one."""
    mean = f"{number(interval.mean, unit, signed=signed)}{after}"
    if interval.count < 2:
        return mean
    low, high = (number(end, unit, signed=signed) for end in (interval.low, interval.high))
    return f'{mean}<span class="interval">{low} to {high}</span>'


def _charts(one: Result) -> str:
    rows = plain_rows(one)
    if len(rows) < 2:
        return ""
    found = []
    for place, first in enumerate(rows[0].scores[:3]):
        dots = [
            charts.Dot(
                row.subject,
                "raw" if row is rows[0] else "refined",
                row.scores[place].interval.mean,
                row.scores[place].interval.low,
                row.scores[place].interval.high,
            )
            for row in rows
            if place < len(row.scores)
        ]
        sign = unit_sign(first.unit)
        title = f"{first.name}, {sign}" if sign else first.name
        chart = charts.intervals(dots, label=first.name, unit=sign)
        found.append(f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>")
    return f'<div class="charts small">{"".join(found)}</div>'


def _classes(one: Result) -> str:
    """IoU of every class, raw beside refined."""
    found = {
        row.subject: values
        for row in one.rows
        if isinstance(values := row.details.get(CLASS_IOU), dict) and DIFFERENCE not in row.subject
    }
    if not found:
        return ""
    names = list(next(iter(found.values())))
    both = len(found) == 2
    head = "<th>class</th>" + "".join(f'<th class="number">{escape(n)}</th>' for n in found)
    head += '<th class="number">difference</th>' if both else ""
    lines = []
    for name in names:
        values = [of.get(name) for of in found.values()]
        cells = "".join(f'<td class="number">{_class_value(value)}</td>' for value in values)
        if both:
            first, second = values
            known = isinstance(first, int | float) and isinstance(second, int | float)
            change = number(second - first, "percent", signed=True) if known else ""  # type: ignore[operator]
            cells += f'<td class="number">{change}</td>'
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f"<details><summary>IoU of every class, %</summary>{table(head, lines)}</details>"


def _settings(given: Given) -> str:
    one = given.result
    facts: list[tuple[str, str]] = [("source", given.source), ("date", one.date)]
    facts += [(name.replace("_", " "), _plain(value)) for name, value in one.settings.items()]
    facts += [
        (f"{row.subject} weights", " ".join(part for part in (row.spec, row.digest[:12]) if part))
        for row in plain_rows(one)
    ]
    facts += [("seconds", f"{one.seconds:g}")]
    facts += [("versions", ", ".join(f"{k} {v}" for k, v in one.versions.items()))]
    command = f"<pre><code>{escape(one.command)}</code></pre>" if one.command else ""
    return facts_table(facts) + command


def facts_table(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in facts
        if value
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _plain(value: JsonValue) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, int | float | str) for one in value):
        return ", ".join(str(one) for one in value)
    return json.dumps(value)


def _class_value(value: JsonValue) -> str:
    return number(value, "percent") if isinstance(value, int | float) else "absent"
