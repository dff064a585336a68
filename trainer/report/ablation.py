"""The table of a sweep: what refining comes to without one of its parts."""

from html import escape

from trainer.ablate.table import SHOWN, Cell, Table, TableRow
from trainer.ablate.variants import FULL
from trainer.report.tables import estimate, table, unit_sign

_NOT_MEASURED = "\N{EN DASH}"


def ablation(sweep: Table) -> str:
    """A row per variant: scores, and below each its difference to the full run."""
    columns = _columns(sweep)
    has_minutes = any(row.minutes is not None for row in sweep.rows)
    is_whole = all(row.status == "done" for row in sweep.rows)
    head = "<th>variant</th>" + "".join(_title(sweep, key) for key in columns)
    head += '<th class="number">training, min</th>' if has_minutes else ""
    head += "" if is_whole else "<th>status</th>"
    lines = []
    for row in sweep.rows:
        cells = {(cell.measure, cell.score): cell for cell in row.cells}
        about = f'<span class="interval">{escape(row.about)}</span>' if row.about else ""
        changes = f'<span class="interval"><code>{escape(row.changes)}</code></span>'
        line = f"<th>{escape(row.name)}{about}{changes if row.changes else ''}</th>"
        line += "".join(f'<td class="number">{_cell(cells.get(key))}</td>' for key in columns)
        if has_minutes:
            minutes = _NOT_MEASURED if row.minutes is None else f"{row.minutes:.1f}"
            line += f'<td class="number">{minutes}</td>'
        line += "" if is_whole else f"<td>{_status(row)}</td>"
        lines.append(f"<tr>{line}</tr>")
    body = f'<div class="ablation">{table(head, lines)}</div>'
    return f'{body}<p class="note">{escape(_note(sweep))}</p>{_command(sweep)}'


def _columns(sweep: Table) -> list[tuple[str, str]]:
    """Measure and score of every column: those that a sweep shows, or the first of a measure."""
    every = dict.fromkeys((cell.measure, cell.score) for row in sweep.rows for cell in row.cells)
    shown = {name for names in SHOWN.values() for name in names}
    found = []
    for measure in dict.fromkeys(measure for measure, _ in every):
        names = [score for of, score in every if of == measure]
        found += [(measure, name) for name in names if name in shown] or [(measure, names[0])]
    return found


def _title(sweep: Table, key: tuple[str, str]) -> str:
    measure, score = key
    cells = (cell for row in sweep.rows for cell in row.cells)
    first = next(cell for cell in cells if (cell.measure, cell.score) == key)
    arrow = "\N{UPWARDS ARROW}" if first.better == "higher" else "\N{DOWNWARDS ARROW}"
    unit = unit_sign(first.unit)
    return (
        f'<th class="number">{escape(f"{score}, {unit}" if unit else score)} '
        f'<span class="arrow" title="{escape(first.better)} is better">{arrow}</span>'
        f'<span class="interval">{escape(measure)}</span></th>'
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return _NOT_MEASURED
    text = estimate(cell.interval, cell.unit)
    if cell.difference is None:
        return text
    change = estimate(cell.difference, cell.unit, signed=True, after=f" vs {FULL}")
    return f'{text}<span class="against">{change}</span>'


def _status(row: TableRow) -> str:
    reasons = "".join(f'<span class="interval">{escape(text)}</span>' for text in row.reasons)
    return f"{escape(row.status)}{reasons}"


def _note(sweep: Table) -> str:
    spreads = sorted({c.spread for row in sweep.rows for c in row.cells if c.spread != "none"})
    seeds = len(sweep.training_seeds)
    runs = f"{seeds} training seed{'s' if seeds > 1 else ''}"
    text = f"Recipe {sweep.recipe}; {runs} and {sweep.probe_seeds} probe seeds. "
    if spreads:
        text += f"Intervals are of 95 %, over {' or '.join(spreads)}. "
    text += f"Differences to the run called {FULL} stand below the scores."
    if sweep.dates:
        text += f" Measured {' to '.join(sweep.dates)}."
    return text


def _command(sweep: Table) -> str:
    return f"<pre><code>{escape(sweep.command)}</code></pre>" if sweep.command else ""
