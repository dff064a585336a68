"""Checkpoints: the state of a run, in one file that is either whole or not there.

The frozen weights are not in it. A run that resumes loads them again and continues to the same
numbers as one that was never interrupted.
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` optimiser steps.

    Attributes:
        step: Optimiser steps taken.
        position: Place in the stream of images of the next one.
        parameters: Everything that trains, by name: the adapter, and a learnable border.
        optimizer: State of the optimiser; the schedule follows from `step`.
        generator: State of the generator that the steps' draws come from.
        channels: Masked channels.
        bad_images: Files that were skipped so far.
        seconds: Time spent training.
        recipe: The recipe, as plain values.
        data: Fingerprint of the images.
        weights: Digest of the frozen weights.
    """

    step: int
    position: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor
    channels: list[int]
    bad_images: list[str]
    seconds: float
    recipe: dict[str, Any]
    data: str
    weights: str


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one at the same place is replaced at once or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT} | asdict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it to start anew"
        ) from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found!r}, and this version reads {FORMAT}; "
            "resume with the version that wrote it, or delete it to start anew"
        )
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer: {error}") from error


def check_same_run(
    checkpoint: Checkpoint, *, recipe: dict[str, Any], data: str, weights: str
) -> None:
    """Refuse to continue another run.

    Raises:
        CheckpointError: recipe, images or frozen weights differ from the checkpoint's.
    """
    changed = sorted(_differences(checkpoint.recipe, recipe))
    if changed:
        raise CheckpointError(
            f"the checkpoint's run had other values of {', '.join(changed)}; resume with its "
            "recipe, or choose another --output"
        )
    if checkpoint.data != data:
        raise CheckpointError(
            "the images are not those of the checkpoint's run (names or sizes differ); "
            "resume with them, or choose another --output"
        )
    if checkpoint.weights != weights:
        raise CheckpointError(
            "the backbone's weights are not those of the checkpoint's run; "
            "resume with them, or choose another --output"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key in old.keys() | new.keys():
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names |= _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            names.add(prefix + key)
    return names
