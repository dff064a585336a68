"""Where the values of a run can be looked at: TensorBoard, Weights & Biases. Both are optional.

Imported when a run asks for them, and not before: neither is needed to train.
"""

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from trainer.config import RunSection
from trainer.errors import TrainerError

WANDB_ID_FILE = "wandb-id"
WANDB_PROJECT = "vit-refinery"


class Board(Protocol):
    """Takes values and pictures of steps, counted from 1."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, picture: Image.Image) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_boards(section: RunSection) -> None:
    """Refuse a run, before anything is loaded, that asks for what is not installed.

    Raises:
        TrainerError: it names the extra to install.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(section, name):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise TrainerError(_missing(name)) from error


def open_boards(output: Path, section: RunSection, *, first_step: int) -> list[Board]:
    """The boards that a run asks for.

    Args:
        output: Folder of the run.
        section: Says which.
        first_step: Steps done before.

    Raises:
        TrainerError: one cannot start.
    """
    check_boards(section)
    boards: list[Board] = []
    try:
        if section.tensorboard:
            boards.append(TensorBoard(output, first_step))
        if section.wandb:
            boards.append(WeightsAndBiases(output))
    except TrainerError:
        for board in boards:
            board.close(failed=True)
        raise
    return boards


class TensorBoard:
    """Event files in OUTPUT/tensorboard; later steps of an interrupted run are purged."""

    def __init__(self, output: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        self._writer.add_image("snapshot", np.asarray(picture), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - events do not say how a run ended
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that a resumed training continues; its files are in OUTPUT/wandb.

    W&B's own variables are in force: WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID.
    Steps that a resumed training takes again are dropped by W&B; they have the same values.
    """

    def __init__(self, output: Path) -> None:
        import wandb

        self._wandb: Any = wandb
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=os.environ.get("WANDB_NAME", output.resolve().name),
                id=os.environ.get("WANDB_RUN_ID") or _run_id(output),
                dir=str(output),
                resume="allow",
            )
        except wandb.Error as error:
            raise TrainerError(
                f"run.wandb is on, and Weights & Biases cannot start: {error}; log in with `wandb "
                "login`, set WANDB_MODE=offline, or set run.wandb=false"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        self._run.log({"snapshot": self._wandb.Image(picture)}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(output: Path) -> str:
    """Kept in the folder of the run, so that a resumed training finds its W&B run again."""
    path = output / WANDB_ID_FILE
    if not path.is_file():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _missing(name: str) -> str:
    return (
        f"run.{name} is on, but {name} is not installed; pip install 'vit-refinery[{name}]', "
        f"or set run.{name}=false"
    )
