"""The training loop: accumulate, clip, refuse what is not finite, step, record, checkpoint.

Where several processes share a run, all of them take every step, and decide alike: on the same
terms and gradients, on a stop that one was asked for, on an error that one met. Rank 0 alone
writes.
"""

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
from trainer.data import BadImages, Batch, LoaderWatch, Source, batches
from trainer.errors import NonFiniteError
from trainer.optim import lr_factor, make_optimizer, set_lr
from trainer.record import METRICS_FILE, Recorder, memory_gib
from trainer.refiner import Refiner
from trainer.snapshots import Snapshots

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
        folder: Source,
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
        self.ranks = refiner.ranks
        self.global_batch = recipe.global_batch * self.ranks.size
        self.num_steps = count_steps(recipe, len(folder), num_processes=self.ranks.size)
        self._output = output
        self._device = refiner.device
        self._trained = {n: p for n, p in refiner.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(
            self._trained.items(), recipe.optim, global_batch=self.global_batch
        )
        self._generator = torch.Generator().manual_seed(recipe.run.seed)
        self._was_unfiltered = False
        self.snapshots: Snapshots | None = None  # pictures on the way, where they are wanted

    @property
    def checkpoint_path(self) -> Path:
        return checkpoint_path(self._output)

    def train(self, stop: StopRequest, console: Console) -> None:
        """Take the steps that are left.

        Raises:
            Interrupted: a stop was requested; a checkpoint was written.
            NonFiniteError: a loss or gradient is not finite; the step was not taken.
            DataError: see `batches`.
            PeerError: another process of the run met an error.
        """
        data, run, progress = self.recipe.data, self.recipe.run, self.progress
        recorder: Recorder | None = None
        with self.ranks.agreed():
            if self.ranks.is_first:
                recorder = Recorder(
                    self._output,
                    run,
                    num_steps=self.num_steps,
                    first_step=progress.step,
                    console=console,
                    snapshots=self.snapshots,
                )
        stream = batches(
            self.folder,
            data,
            size=self.refiner.size,
            seed=run.seed,
            bad=self.bad,
            position=progress.position,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            device=self._device,
        )
        watch = LoaderWatch(stream, images_per_step=self.recipe.global_batch)
        self.refiner.train()
        signum = 0
        with recorder or contextlib.nullcontext(), contextlib.closing(stream):
            while progress.step < self.num_steps:
                (signum,) = self.ranks.max(stop.signum or 0)
                if signum:
                    break
                started = time.monotonic()
                values = self._step(stream)
                elapsed = time.monotonic() - started
                progress.seconds += elapsed
                values |= {
                    "images_per_second": self.global_batch / elapsed,
                    "seconds_per_step": elapsed,
                    "memory_gib": memory_gib(self._device),
                }
                values |= watch.step(elapsed)
                if recorder is not None:
                    recorder.step(progress.step, values)
                if progress.step % run.checkpoint_every == 0:
                    self.save()
        self.save()
        if signum:
            raise Interrupted(signum, progress.step)

    def _step(self, stream: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; the mean of its terms over the accumulated forwards."""
        optim, progress = self.recipe.optim, self.progress
        lr = set_lr(self._optimizer, lr_factor(progress.step, self.num_steps, optim))
        self._optimizer.zero_grad(set_to_none=True)
        num_forwards = self.recipe.data.accumulate
        terms: list[dict[str, Tensor]] = []
        position = progress.position
        for _ in range(num_forwards):
            with self.ranks.agreed():
                images, position = next(stream)
            draws = self.refiner.draw(
                len(images),
                progress=progress.step / self.num_steps,
                generator=self._generator,
                size=images.shape[-1],
            )
            output = self.refiner(images.to(self._device, non_blocking=True), draws)
            (output.loss / num_forwards).backward()
            terms.append(output.terms)
        self.ranks.average_gradients(list(self._trained.values()))
        norm = torch.nn.utils.clip_grad_norm_(
            self._trained.values(), optim.clip_norm or math.inf, error_if_nonfinite=False
        )
        # One copy to the host per optimiser step: a GPU must not wait for every term.
        names = list(terms[0])
        table = torch.stack([torch.stack([t[n].float() for n in names]) for t in terms])
        table = self.ranks.mean(table)
        means = torch.cat([table.mean(dim=0), norm.detach().float()[None]]).tolist()
        values = dict(zip([*names, "grad_norm"], means, strict=True))
        with self.ranks.agreed():
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
        """Write a checkpoint; all ranks together."""
        self.bad.paths |= set[Path]().union(*self.ranks.all(self.bad.paths))
        with self.ranks.agreed():
            if self.ranks.is_first:
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        checkpoint = Checkpoint(
            **asdict(self.progress),
            **asdict(self.identity),
            parameters={name: p.detach().cpu() for name, p in self._trained.items()},
            optimizer=self._optimizer.state_dict(),
            generator=self._generator.get_state(),
            channels=[] if self.refiner.channels is None else self.refiner.channels.tolist(),
            bad_images=sorted(str(path) for path in self.bad.paths),
            global_batch=self.global_batch,
            forward_batch=self.recipe.data.batch_size * self.ranks.size,
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


def count_steps(recipe: Recipe, num_images: int, *, num_processes: int = 1) -> int:
    """Optimiser steps of a run: `epochs` passes in whole batches, one at least."""
    global_batch = recipe.global_batch * num_processes
    steps = max(1, int(recipe.data.epochs * num_images / global_batch))
    return min(steps, recipe.run.max_steps or steps)
