"""The training loop: accumulate, clip, refuse what is not finite, step, record, checkpoint."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
from rich.console import Console
from torch import Tensor

from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.config import Recipe
from trainer.data import BadImages, Batch, ImageFolder, batches
from trainer.errors import NonFiniteError
from trainer.optim import lr_factor, make_optimizer, set_lr
from trainer.record import METRICS_FILE, Recorder, memory_gib
from trainer.refiner import Refiner

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """The run was asked to stop, and wrote a checkpoint."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopRequest:
    """SIGTERM and SIGINT as a request that the loop sees between steps; a second one kills."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, signal.Handlers | None] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._note)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum
        logger.info("%s: stopping after this step", signal.Signals(signum).name)


@dataclass
class Progress:
    """Where a run is; a checkpoint holds it."""

    step: int = 0
    position: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Identity:
    """What a run is made of; a checkpoint continues only the same."""

    recipe: dict[str, object]
    data: str
    weights: str


class Loop:
    """A run between its preparation and its artifact.

    Args:
        refiner: On its device.
        recipe: Its sections `data`, `optim` and `run` are used.
        folder: Images.
        bad: What is done about unreadable ones.
        output: Folder of the run.
        identity: Goes into checkpoints.
    """

    def __init__(
        self,
        refiner: Refiner,
        recipe: Recipe,
        folder: ImageFolder,
        bad: BadImages,
        *,
        output: Path,
        identity: Identity,
    ) -> None:
        self.refiner = refiner
        self.recipe = recipe
        self.folder = folder
        self.bad = bad
        self.identity = identity
        self.progress = Progress()
        self.num_steps = count_steps(recipe, len(folder))
        self._output = output
        self._device = refiner.reference_13SS.device
        self._trained = {n: p for n, p in refiner.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(
            self._trained.items(), recipe.optim, global_batch=recipe.global_batch
        )
        self._generator = torch.Generator().manual_seed(recipe.run.seed)
        self._was_unfiltered = False

    @property
    def checkpoint_path(self) -> Path:
        return checkpoint_path(self._output)

    def train(self, stop: StopRequest, console: Console) -> None:
        """Take the steps that are left.

        Raises:
            Interrupted: a stop was requested; a checkpoint was written.
            NonFiniteError: a loss or gradient is not finite; the step was not taken.
            DataError: see `batches`.
        """
        data, run, progress = self.recipe.data, self.recipe.run, self.progress
        recorder = Recorder(
            self._output,
            run,
            num_steps=self.num_steps,
            first_step=progress.step,
            console=console,
        )
        stream = batches(
            self.folder,
            data,
            size=self.refiner.size,
            seed=run.seed,
            bad=self.bad,
            position=progress.position,
        )
        self.refiner.train()
        with recorder, contextlib.closing(stream):
            while progress.step < self.num_steps and stop.signum is None:
                started = time.monotonic()
                values = self._step(stream)
                elapsed = time.monotonic() - started
                progress.seconds += elapsed
                values |= {
                    "images_per_second": self.recipe.global_batch / elapsed,
                    "seconds_per_step": elapsed,
                    "memory_gib": memory_gib(self._device),
                }
                recorder.step(progress.step, values)
                if progress.step % run.checkpoint_every == 0:
                    self.save()
        self.save()
        if stop.signum is not None and progress.step < self.num_steps:
            raise Interrupted(stop.signum, progress.step)

    def _step(self, stream: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; the mean of its terms over the accumulated forwards."""
        optim, progress = self.recipe.optim, self.progress
        lr = set_lr(self._optimizer, lr_factor(progress.step, self.num_steps, optim))
        self._optimizer.zero_grad(set_to_none=True)
        num_forwards = self.recipe.data.accumulate
        terms: list[dict[str, Tensor]] = []
        position = progress.position
        for _ in range(num_forwards):
            images, position = next(stream)
            draws = self.refiner.draw(
                len(images),
                progress=progress.step / self.num_steps,
                generator=self._generator,
            )
            output = self.refiner(images.to(self._device, non_blocking=True), draws)
            (output.loss / num_forwards).backward()
            terms.append(output.terms)
        norm = torch.nn.utils.clip_grad_norm_(
            self._trained.values(), optim.clip_norm or math.inf, error_if_nonfinite=False
        )
        # One copy to the host per optimiser step: a GPU must not wait for every term.
        names = list(terms[0])
        table = torch.stack([torch.stack([t[n].float() for n in names]) for t in terms])
        means = torch.cat([table.mean(dim=0), norm.detach().float()[None]]).tolist()
        values = dict(zip([*names, "grad_norm"], means, strict=True))
        self._refuse_non_finite(values)
        self._note_unfiltered(values["clean"])
        self._optimizer.step()
        progress.step += 1
        progress.position = position
        return values | {"lr": lr}

    def _refuse_non_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"step {self.progress.step + 1}: {', '.join(bad)} not finite, so the step was not "
                "taken; start anew in another --output with a lower optim.lr, or with "
                "run.precision=fp32"
            )

    def _note_unfiltered(self, clean: float) -> None:
        """Say once that a step had to learn from spurious tokens too."""
        if clean == 0 and not self._was_unfiltered:
            self._was_unfiltered = True
            logger.warning(
                "step %d: the filters left no crop token, so all of them were used; if `clean` in "
                "%s stays near 0, the thresholds do not fit this backbone: try "
                "filters.fp_gp.criterion=zscore",
                self.progress.step + 1,
                METRICS_FILE,
            )

    def save(self) -> None:
        """Write a checkpoint."""
        checkpoint = Checkpoint(
            **asdict(self.progress),
            **asdict(self.identity),
            parameters={name: p.detach().cpu() for name, p in self._trained.items()},
            optimizer=self._optimizer.state_dict(),
            generator=self._generator.get_state(),
            channels=[] if self.refiner.channels is None else self.refiner.channels.tolist(),
            bad_images=sorted(str(path) for path in self.bad.paths),
        )
        save_checkpoint(self.checkpoint_path, checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint was written."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(checkpoint.parameters[name])
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self._generator.set_state(checkpoint.generator)
        self.bad.paths |= {Path(path) for path in checkpoint.bad_images}
        self.progress = Progress(checkpoint.step, checkpoint.position, checkpoint.seconds)


def checkpoint_path(output: Path) -> Path:
    """Where a run's checkpoint is."""
    return output / "checkpoint.pt"


def count_steps(recipe: Recipe, num_images: int) -> int:
    """Optimiser steps of a run: `epochs` passes in whole batches, one at least."""
    steps = max(1, int(recipe.data.epochs * num_images / recipe.global_batch))
    return min(steps, recipe.run.max_steps or steps)
