"""A sweep whose commands write what the real ones would, at once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backbone.artifact import read_manifest
from tests.support import tiny_artifact
from tests.trainer.refining import image_folder, model_folder
from trainer.evaluate import results
from trainer.evaluate.results import Row

SETTINGS = ["--set", "data.size=64", "--set", "data.batch_size=2"]
RAW_MIOU = 40.0


def sweep_arguments(tmp_path: Path, *more: str, images: str = "images") -> list[str]:
    """Arguments of a sweep over two variants and a data set."""
    if not (tmp_path / "images").exists():
        image_folder(tmp_path / "images", count=2)
        model_folder(tmp_path / "model")
        labelled_folder(tmp_path / "scenes")
    return [
        *("--recipe", "paper", "--images", str(tmp_path / images)),
        *("--output", str(tmp_path / "out"), *SETTINGS),
        *("--set", f"backbone.name={json.dumps(str(tmp_path / 'model'))}"),
        *("--segmentation", str(tmp_path / "scenes"), *more),
    ]


def labelled_folder(folder: Path, count: int = 2) -> Path:
    """A data set of two classes, the left and the right half, for the segmentation probe."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("images", "labels"):
            (folder / part / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            pixels[:, 32:] += 127
            labels = np.zeros((64, 64), dtype=np.uint8)
            labels[:, 32:] = 1
            Image.fromarray(pixels).save(folder / part / "images" / f"{number}.png")
            Image.fromarray(labels).save(folder / part / "labels" / f"{number}.png")
    (folder / "classes.json").write_text('{"0": "dark", "1": "bright"}')
    return folder


class FakeRunner:
    """Remembers what it ran; `behave` may take a command over and give its exit code."""

    def __init__(self, behave: Callable[[list[str], Path], int | None] | None = None) -> None:
        self.signum: int | None = None
        self.commands: list[list[str]] = []
        self._behave = behave

    def run(self, command: Sequence[str], log: Path) -> int:
        words = list(command)
        self.commands.append(words)
        log.parent.mkdir(parents=True, exist_ok=True)
        code = None if self._behave is None else self._behave(words, log)
        if code is not None:
            return code
        if words[2] == "trainer":
            finish_training(Path(value(words, "--output")))
        else:
            finish_evaluation(words)
        return 0

    @property
    def done(self) -> list[str]:
        """What was run, in short: the run's folder, and what of it was measured."""
        return [_short(words) for words in self.commands]


def value(words: Sequence[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def finish_training(folder: Path, seconds: float = 30.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"step": step, "seconds_per_step": seconds} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    tiny_artifact(folder / "refined")


def finish_evaluation(words: Sequence[str]) -> None:
    is_alone = "--baseline" in words
    miou = 50.0 + len(value(words, "--model")) % 7
    rows = [("refined", [miou, miou + 2])]
    if not is_alone:
        rows.insert(0, ("raw", [RAW_MIOU, RAW_MIOU + 2]))
    digest = read_manifest(Path(value(words, "--model"))).digest
    write_result(Path(value(words, "--json")), rows, digest=digest)


def write_result(
    path: Path,
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    task: Any = "segmentation",
    score: str = "mIoU",
    unit: Any = "percent",
    better: Any = "higher",
    digest: str = "",
) -> None:
    """A result file as `trainer.evaluate` writes it."""
    result = results.new_result(
        task=task,
        dataset="scenes",
        protocol="By hand.",
        settings={},
        rows=[
            Row(
                subject=name,
                digest=digest if name == "refined" else "",
                scores=(results.score(score, values, better=better, unit=unit),),
            )
            for name, values in rows
        ],
        seconds=6.0,
    )
    results.write(result, path)


def _short(words: Sequence[str]) -> str:
    if words[2] == "trainer":
        folder = Path(value(words, "--output"))
        resumed = " resumed" if "--resume" in words else ""
        return f"train {folder.parent.name}/{folder.name}{resumed}"
    run = Path(value(words, "--model")).parent
    width = f" width {value(words, '--register-width')}" if "--register-width" in words else ""
    return f"{words[3]} {run.parent.name}/{run.name}{width}"
