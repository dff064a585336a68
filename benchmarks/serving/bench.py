"""What every scenario works with: the model, the images, the service, and how long it may take."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from backbone import DenseEncoder
from benchmarks.serving.images import Traffic, in_aspects
from benchmarks.serving.measure import Figures, Knee, knee_of, sweep
from benchmarks.serving.processes import ServerProcess, serving

_LEVELS = (1, 2, 4, 8, 16, 32, 64)
_SWEEP_SECONDS = 15.0


@dataclass(slots=True, kw_only=True)
class Bench:
    """One model on one machine, as the command line has it."""

    model: str
    precision: str
    size: tuple[int, int]  # (h, w) px
    images: list[bytes]
    encoder: DenseEncoder
    info: dict[str, Any]  # what the service says of itself
    arguments: argparse.Namespace
    _in_aspects: list[bytes] = field(default_factory=list)

    def seconds(self, default: float) -> float:
        """How long one measured part of a scenario lasts."""
        return float(self.arguments.seconds or default)

    @property
    def levels(self) -> tuple[int, ...]:
        """Concurrencies of a sweep."""
        return tuple(self.arguments.concurrency or _LEVELS)

    @property
    def num_rounds(self) -> int:
        return int(self.arguments.rounds)

    @property
    def tolerance(self) -> float:
        """Relative error in float32 that the service declares."""
        return float(self.info["tolerance"]["max_relative_error"])

    @contextmanager
    def service(self, *flags: str, module: str = "service") -> Iterator[ServerProcess]:
        """The service with `flags` and those of the command line."""
        with serving(
            self.model,
            precision=self.precision,
            flags=[*flags, *self.arguments.service],
            module=module,
        ) as server:
            yield server

    def traffic(self, *, hit_rate: float = 0.0, query: str = "", headers: str = "") -> Traffic:
        """Photographs at the size of the run."""
        return Traffic(
            self.images,
            sides=[self.size],
            hit_rate=hit_rate,
            query=query,
            headers=headers,
            seed=self.arguments.seed,
        )

    def mixed_traffic(self, *, hit_rate: float = 0.0, headers: str = "") -> Traffic:
        """Photographs of aspects 1:2 to 2:1 at the sizes of `--sides`."""
        if not self._in_aspects:
            self._in_aspects = in_aspects(self.images)
        return Traffic(
            self._in_aspects,
            sides=self.arguments.sides,
            hit_rate=hit_rate,
            headers=headers,
            seed=self.arguments.seed,
        )

    def find_knee(
        self,
        server: ServerProcess,
        traffic: Traffic,
        *,
        seconds: float = _SWEEP_SECONDS,
        levels: Sequence[int] | None = None,
    ) -> tuple[Knee, list[Figures]]:
        """The knee of `traffic`, by a sweep, and the sweep's points."""
        points = sweep(server.target, traffic, levels or self.levels, seconds=self.short(seconds))
        return knee_of(points), points

    def short(self, seconds: float) -> float:
        """`seconds`, or less when the run was asked to be shorter."""
        return min(seconds, self.seconds(seconds))
