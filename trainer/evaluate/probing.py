"""What evaluations by a probe share: features of every subject, and a probe for each seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor

from trainer.evaluate.datasets import DepthDataset, Sample, SegmentationDataset
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.finished import FinishedProbes, content_digest
from trainer.evaluate.images import ShortSide, Size
from trainer.evaluate.progress import Advance, Progress
from trainer.evaluate.reading import LazyTensors
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows

Probe = TypeVar("Probe")


class Settings(Protocol):
    """Of a probe: a frozen dataclass."""

    @property
    def seed(self) -> int: ...
    @property
    def num_steps(self) -> int: ...


Chosen = TypeVar("Chosen", bound=Settings)


def targets(samples: Sequence[Sample], read: Callable[[Sample], Tensor]) -> LazyTensors:
    """Label or depth maps of samples in their order."""
    return LazyTensors(len(samples), lambda index: read(samples[index]))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Features `[h, w, C]` of one subject, per image."""

    train_grids: Sequence[Tensor]
    val_grids: Sequence[Tensor]


def check_dataset(
    dataset: SegmentationDataset | DepthDataset,
    subjects: Sequence[Subject],
    settings_by_seed: Sequence[Settings],
) -> None:
    """
    Raises:
        EvaluationError: There is nothing to train a probe on, to score or to measure.
    """
    for part, samples in (("train", dataset.train), ("val", dataset.val)):
        if not samples:
            raise EvaluationError(
                f"{dataset.name} ({dataset.layout}) has no {part} part; a probe is trained on "
                "train and scored on val, so give a folder that has both"
            )
    if not subjects or not settings_by_seed:
        raise EvaluationError("a probe needs a backbone and a seed; give one of each or more")


def probe_all(
    dataset: SegmentationDataset | DepthDataset,
    subjects: Sequence[Subject],
    kind: type[Probe],
    measure: Callable[[Parts, Chosen, Advance], Probe],
    *,
    store: FeatureStore,
    size: Size,
    windows: Windows | None,
    batch_size: int,
    settings_by_seed: Sequence[Chosen],
    decides: Mapping[str, JsonValue],
    device: torch.device | str,
    progress: Progress,
) -> Iterator[tuple[Subject, list[Probe]]]:
    """Every subject with its probes, one for each of `settings_by_seed`.

    Args:
        dataset: Images and what is known of their pixels.
        subjects: Whose features are probed, one after the other.
        kind: Of the probe's result.
        measure: Trains and scores a probe.
        store: Keeps features and finished probes.
        size: Of images, see `FeatureStore.features`.
        windows: See `encode_grid`.
        batch_size: Most images encoded at once.
        settings_by_seed: Of each probe.
        decides: What else the scores depend on.
        device: Where probes are trained: part of what decides the last digits.
        progress: Is told how far this is.
    """
    folder = store.folder
    finished = FinishedProbes(folder / "probes" if folder else None)
    every = (*dataset.train, *dataset.val)
    paths = [path for sample in every for path in (sample.image, sample.target)]
    files = content_digest(paths) if folder else None
    for subject in subjects:
        parts = Parts(
            *(
                store.features(
                    subject,
                    samples,
                    size=size,
                    windows=windows,
                    batch_size=batch_size,
                    progress=progress,
                    title=f"encode {part}",
                )
                for part, samples in (("train", dataset.train), ("val", dataset.val))
            )
        )
        probes = []
        for number, settings in enumerate(settings_by_seed):
            key: dict[str, JsonValue] = {
                **decides,
                "kind": kind.__name__,
                "subject": subject.key,
                "files": files,
                "num_train": len(dataset.train),
                "size": describe_size(size),
                "windows": list(windows) if windows else None,
                "device": torch.device(device).type,
                "settings": describe_settings(settings),
            }

            def train(
                subject: Subject = subject,
                parts: Parts = parts,
                settings: Chosen = settings,
                number: int = number,
            ) -> Probe:
                title = f"probe {subject.name}, {number + 1} of {len(settings_by_seed)}"
                with progress.stage(title, settings.num_steps + len(dataset.val)) as advance:
                    return measure(parts, settings, advance)

            probes.append(finished.once(key, kind, train))
        yield subject, probes


def describe_size(size: Size) -> JsonValue:
    """A size as results show it."""
    if isinstance(size, ShortSide):
        return f"short side {size.pixels}"
    return list(size)


def describe_settings(settings: Settings) -> dict[str, JsonValue]:
    """All fields of settings, for JSON."""
    described: dict[str, JsonValue] = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return described


def describe_all(
    settings_by_seed: Sequence[Settings], size: Size, windows: Windows | None
) -> dict[str, JsonValue]:
    """What a result says of how probes were trained; seeds are listed, the rest is of the first."""
    described = describe_settings(settings_by_seed[0])
    del described["seed"]
    seeds: list[JsonValue] = [settings.seed for settings in settings_by_seed]
    return {
        "size": describe_size(size),
        "windows": list(windows) if windows else None,
        **described,
        "seeds": seeds,
    }
