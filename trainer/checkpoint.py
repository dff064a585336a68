"""Checkpoints: the state of a run, in one file that is either whole or not there.

The frozen weights are not in it. A run that resumes loads them again and continues to the same
numbers as one that was never interrupted.
"""

import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import Recipe
from trainer.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 2


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
        global_batch: Images of an optimiser step, of all processes.
        forward_batch: Those of one forward, of all processes: what statistics are taken over.
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
    global_batch: int
    forward_batch: int


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


def fit_batches(recipe: Recipe, checkpoint: Checkpoint, *, num_processes: int) -> Recipe:
    """The recipe with `data.accumulate` such that a step still takes the checkpoint's images.

    Raises:
        CheckpointError: no number of forwards does that.
    """
    data, wanted = recipe.data, checkpoint.global_batch
    forward_batch = data.batch_size * num_processes
    if wanted % forward_batch:
        sizes = [n for n in range(1, wanted + 1) if wanted % (n * num_processes) == 0]
        counts = [n for n in range(1, wanted + 1) if wanted % (n * data.batch_size) == 0]
        cures = [f"start {_list(counts)} processes"] if counts else []
        cures += [f"set data.batch_size to {_list(sizes)}"] if sizes else []
        cures = cures or [f"start one process, and set data.batch_size to a divisor of {wanted}"]
        raise CheckpointError(
            f"the run takes {wanted} images a step, and a forward in {num_processes} processes "
            f"with data.batch_size={data.batch_size} takes {forward_batch}, which does not divide "
            f"it; {' or '.join(cures)}"
        )
    if forward_batch != checkpoint.forward_batch:
        logger.warning(
            "statistics over a batch are of %d images from here on, of %d before: "
            "the numbers differ slightly from those of a run that was not interrupted",
            forward_batch,
            checkpoint.forward_batch,
        )
    accumulate = wanted // forward_batch
    if accumulate != data.accumulate:
        logger.info("data.accumulate is %d now: %d images a step", accumulate, wanted)
    data = data.model_copy(update={"accumulate": accumulate})
    return recipe.model_copy(update={"data": data})


def _list(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key in old.keys() | new.keys():
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names |= _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            names.add(prefix + key)
    return names
