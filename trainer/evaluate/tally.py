"""Scores of values per image, of one subject and of the difference of two."""

from collections.abc import Sequence
from typing import Literal

from trainer.evaluate.intervals import bootstrap
from trainer.evaluate.results import Row, Score, Unit
from trainer.evaluate.spurious import SpuriousScores, Thresholds, spurious_shares


class Tally:
    """Scores of one subject as they come in."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self.scores: list[Score] = []
        self.by_layer: dict[str, list[float]] = {}

    def add(
        self,
        name: str,
        layers: Sequence[Sequence[float]],
        *,
        better: Literal["higher", "lower"] = "lower",
        unit: Unit = "percent",
    ) -> None:
        """A score of values per image; of every layer that was measured, or of the last alone."""
        scale = 100 if unit == "percent" else 1
        values = [[scale * float(value) for value in layer] for layer in layers]
        self.scores.append(_score(name, values[-1], better=better, unit=unit))
        if len(values) > 1:
            self.by_layer[name] = [sum(layer) / len(layer) for layer in values]

    def shares(
        self, layers: Sequence[SpuriousScores], thresholds: Sequence[Thresholds], prefix: str = ""
    ) -> None:
        """The shares of FP and GP."""
        shares = [
            [spurious_shares(one, limits) for one in scores.by_image(self._num_images)]
            for scores, limits in zip(layers, thresholds, strict=True)
        ]
        for name, field in (("FP", "fixed_pattern"), ("GP", "global_proxy"), ("FP or GP", "fp_gp")):
            self.add(prefix + name, [[getattr(one, field) for one in layer] for layer in shares])


def _score(
    name: str, values: Sequence[float], *, better: Literal["higher", "lower"], unit: Unit
) -> Score:
    return Score(
        name=name, unit=unit, better=better, interval=bootstrap(values), values=tuple(values)
    )


def difference(first: Row, second: Row) -> Row:
    """The second minus the first image by image, so that what differs between images cancels."""
    scores = [
        _score(
            after.name,
            [b - a for a, b in zip(before.values, after.values, strict=True)],
            better=after.better,
            unit=after.unit,
        )
        for before, after in zip(first.scores, second.scores, strict=True)
    ]
    return Row(subject=f"{second.subject} minus {first.subject}", scores=tuple(scores))
