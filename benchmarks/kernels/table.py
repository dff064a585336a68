"""Results as CSV, as a Markdown table and as a plot."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels.cases import OURS
from benchmarks.kernels.measure import Ceilings


class Row(NamedTuple):
    """One contender of one case."""

    operation: str
    shape: str
    batch: int
    mode: str
    dtype: str
    contender: str
    ms_median: float
    ms_p20: float
    ms_p80: float
    times_ours: float  # its time over ours: above 1, ours is faster
    peak_mib: float  # memory held beyond the inputs, results included
    gb_per_second: float  # of the bytes that must move
    share_of_copy: float
    tflops: float
    share_of_matmul: float


def write_csv(rows: Iterable[Row], environment: Mapping[str, str], path: Path) -> None:
    """Rows, each with where it was measured."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields, *environment])
        for row in rows:
            cells = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row]
            writer.writerow([*cells, *environment.values()])


def to_markdown(
    rows: Sequence[Row], environment: Mapping[str, str], ceilings: Ceilings, command: str
) -> str:
    """A table of all cases: our time, and the others' as multiples of it."""
    where = ", ".join(f"{key} {value}" for key, value in environment.items())
    lines = [
        f"`{command}`",
        "",
        f"{where}. Memory is what a call holds at most beyond its inputs; on a CPU less than 1 MiB "
        "is not seen. Ceilings measured in the same run: "
        f"copy {ceilings.copy_gb_per_second:.0f} GB/s, "
        f"matrix product {ceilings.matmul_tflops:.3g} TFLOP/s.",
        "",
        "| operation | shape | batch | mode | dtype | ours, ms | ours, MiB "
        "| others over ours: time, memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for own, others in _by_case(rows):
        compared = "; ".join(
            f"{row.contender} {row.times_ours:.2f}x, {_multiple(row.peak_mib, own.peak_mib)}"
            for row in others
        )
        lines.append(
            f"| {own.operation} | {own.shape} | {own.batch} | {own.mode} | {own.dtype} | "
            f"{own.ms_median:.3g} | {own.peak_mib:.3g} | {compared} |"
        )
    return "\n".join([*lines, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time of every contender over ours, a panel for each operation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[tuple[str, list[Row]]]] = defaultdict(list)
    for own, others in _by_case(rows):
        label = f"{own.shape}, batch {own.batch}, {own.mode}, {own.dtype}"
        panels[own.operation].append((label, others))
    heights = [max(1.6, 0.3 * sum(len(o) for _, o in cases)) for cases in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, sum(heights) + len(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (operation, cases) in zip(axes[:, 0], panels.items(), strict=True):
        bars = [(label, row) for label, others in reversed(cases) for row in reversed(others)]
        labels = [f"{label}: {row.contender}" for label, row in bars]
        colours = [_colour(row) for _, row in bars]
        axis.barh(labels, [row.times_ours for _, row in bars], color=colours)
        axis.margins(y=0.01)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(operation, loc="left", fontsize=10)
        axis.set_xlabel("time / ours")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=72)
    pyplot.close(figure)


def _colour(row: Row) -> str:
    """Green: slower than ours; red: faster; grey: another way of ours."""
    if row.contender.startswith(OURS):
        return "#8a8f98"
    return "#2a7f62" if row.times_ours >= 1 else "#b5483a"


def _by_case(rows: Sequence[Row]) -> Iterable[tuple[Row, list[Row]]]:
    """Our row of each case, and the others'."""
    grouped: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row[:5]].append(row)
    for group in grouped.values():
        (own,) = (row for row in group if row.contender == OURS)
        yield own, [row for row in group if row.contender != OURS]


def _multiple(value: float, own: float) -> str:
    return f"{value / own:.2g}x" if own >= 1 else f"{value:.3g} MiB"
