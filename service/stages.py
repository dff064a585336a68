"""How long a request spent in which stage, for its headers, its trace and the metrics."""

import time
from dataclasses import dataclass, field

from service.metrics import Stage
from service.tracing import StageSpan


@dataclass(slots=True)
class Stages:
    """Seconds that a request spent in each stage."""

    seconds: dict[Stage, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _mark: float = field(default_factory=time.perf_counter)

    def end(self, stage: Stage) -> None:
        """The stage that began when the last one ended is over."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._mark
        self._mark = now

    def skip_to_now(self) -> None:
        self._mark = time.perf_counter()

    def spans(self) -> list[StageSpan]:
        """The stages one after the other, for a trace; of several images the slowest counts."""
        spans = []
        began = self._began
        for name, seconds in self.seconds.items():
            spans.append(StageSpan(name, began, began + seconds))
            began += seconds
        return spans

    def header(self) -> str:
        """The value of `Server-Timing`, in milliseconds."""
        return ", ".join(f"{name};dur={value * 1e3:.2f}" for name, value in self.seconds.items())
