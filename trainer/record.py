"""What a run tells while it goes: metrics.jsonl, a progress bar or log lines, boards, pictures."""

import json
import logging
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.boards import open_boards
from trainer.config import RunSection
from trainer.snapshots import Snapshots
from trainer.watch import FilterWatch

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_METRIC_STEPS = 20
_SHORT = {
    "loss": "loss",
    "refinement": "regu",
    "register_uniformity": "uni",
    "absorption": "spu",
    "consistency": "con",
}
_FILTERS = {
    "clean_fixed_pattern": "fp",
    "clean_global_proxy": "gp",
    "clean_register_guided": "reg",
    "clean_attention_hijack": "ah",
}


class Recorder:
    """Takes the values of every optimiser step.

    Args:
        output: Folder of the run.
        section: Settings.
        num_steps: Optimiser steps in all.
        first_step: Steps done before; records of later ones, which will be done again, are dropped.
        console: Where the progress bar goes.
        snapshots: Pictures every `run.snapshot_every` steps; none without.
    """

    def __init__(
        self,
        output: Path,
        section: RunSection,
        *,
        num_steps: int,
        first_step: int,
        console: Console,
        snapshots: Snapshots | None = None,
    ) -> None:
        self._section = section
        self._num_steps = num_steps
        self._path = output / METRICS_FILE
        kept = [line for line in read_metrics(output) if line["step"] <= first_step]
        rewritten = self._path.with_name(f".{METRICS_FILE}")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        rewritten.replace(self._path)  # at once: a run killed here must not lose its records
        self._boards = open_boards(output, section, first_step=first_step)
        self._file = self._path.open("a")
        self._snapshots = snapshots
        self._watch = FilterWatch()
        self._has_bar = console.is_terminal
        self._bar = Progress(
            TextColumn("refining"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()
        for board in self._boards:
            board.close(failed=kind is not None)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, counted from 1."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.scalars(step, values)
        self._watch.step(step, values)
        every = self._section.snapshot_every
        if self._snapshots is not None and every and step % every == 0:
            picture = self._snapshots.take(step)
            for board in self._boards:
                board.picture(step, picture)
        status = _status(values)
        self._bar.update(self._task, completed=step, status=status)
        shown = step % self._section.log_every == 0 or step == self._num_steps
        if shown and not self._has_bar:
            left = (self._num_steps - step) * values["seconds_per_step"]
            logger.info("step %d of %d: %s, %.0f s left", step, self._num_steps, status, left)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run so far, one per step; a last line that was cut off is left out."""
    path = output / METRICS_FILE
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning("%s has a broken line, which is dropped: %.60s", path, line)
    return records


def final_metrics(output: Path) -> dict[str, float]:
    """Means over the last steps of what a run recorded."""
    last = read_metrics(output)[-_METRIC_STEPS:]
    names = [name for name in last[-1] if name != "step"] if last else []
    return {
        name: sum(record[name] for record in last if name in record)
        / sum(name in record for record in last)
        for name in names
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**30 if sys.platform == "darwin" else 2**20)


def _status(values: Mapping[str, float]) -> str:
    losses = " ".join(f"{short} {values[n]:.3f}" for n, short in _SHORT.items() if n in values)
    filters = " ".join(f"{s} {100 * values[n]:.0f}" for n, s in _FILTERS.items() if n in values)
    return (
        f"{losses}, clean {100 * values['clean']:.0f} % ({filters}), "
        f"{values['images_per_second']:.1f} images/s, {values['memory_gib']:.1f} GiB"
    )
