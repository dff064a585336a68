"""What a scenario found: checks against criteria, tables, and the figures behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.serving.measure import Figures


class Check(NamedTuple):
    """One criterion."""

    criterion: str
    measured: str
    passed: bool | None  # None: it could not be tried; `measured` says why


class Table(NamedTuple):
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Outcome:
    """The result of one scenario."""

    scenario: str
    what: str
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, criterion: str, measured: str, passed: bool | None) -> None:
        self.checks.append(Check(criterion, measured, passed))

    @property
    def failed(self) -> bool:
        return any(check.passed is False for check in self.checks)


LOAD_HEADER = (
    "", "images/s", "p50", "p90", "p95", "p99", "p99.9", "max, ms", "answers", "KiB each",
)  # fmt: skip


def load_row(name: str, figures: Figures) -> list[str]:
    """A row under `LOAD_HEADER`."""
    latency = figures["latency_ms"]
    cells = [
        f"{latency[key]:.0f}" if latency else "-"
        for key in ("p50", "p90", "p95", "p99", "p99.9", "max")
    ]
    rate = f"{figures['rate']:.1f}" + (" VOID" if figures.get("is_void") else "")
    return [
        name,
        rate,
        *cells,
        counts(figures["statuses"]),
        f"{figures['response_bytes'] / 1024:.0f}",
    ]


def load_table(title: str, rows: Sequence[tuple[str, Figures]]) -> Table:
    """Latency and throughput of several runs."""
    return Table(title, LOAD_HEADER, [load_row(name, figures) for name, figures in rows])


def stage_table(title: str, rows: Sequence[tuple[str, Figures]]) -> Table:
    """Mean time in each stage, of several runs."""
    stages = list(dict.fromkeys(stage for _, each in rows for stage in each["stage_ms"]))
    return Table(
        title,
        ("", *stages),
        [
            [
                name,
                *(
                    f"{each['stage_ms'][stage]['mean']:.1f}" if stage in each["stage_ms"] else "-"
                    for stage in stages
                ),
            ]
            for name, each in rows
        ],
    )


def livez_table(rows: Sequence[tuple[str, Figures]]) -> Table:
    """Probes of several runs."""
    return Table(
        "/livez, 20 probes a second from another process, ms",
        ("", "probes", "failed", "p50", "p99", "max", "prober woken late, p99"),
        [
            [
                name,
                str(each["probes"]),
                str(each["failed"]),
                *(f"{each['latency_ms'].get(key, 0):.1f}" for key in ("p50", "p99", "max")),
                f"{each['prober_lateness_ms'].get('p99', 0):.1f}",
            ]
            for name, each in rows
        ],
    )


def counts(values: dict[str, int]) -> str:
    """As `200: 512, 429: 3`."""
    return ", ".join(f"{name or '-'}: {number}" for name, number in sorted(values.items()))
