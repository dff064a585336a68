"""Carries out a plan: what is finished stays, what was stopped goes on, what fails costs itself."""

import fcntl
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from trainer.ablate.children import Runner, reason_of
from trainer.ablate.plan import Plan, Step
from trainer.ablate.record import read_result
from trainer.errors import TrainerError
from trainer.record import read_metrics

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """A step that failed.

    Attributes:
        title: Of the step.
        reason: In one line.
        log: Where there is more; None where the step was not begun.
    """

    title: str
    reason: str
    log: Path | None


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        failures: By row.
        exit_code: 0; 1 with failures; 75 or 130 when it was stopped.
    """

    failures: dict[str, list[Failure]] = field(default_factory=dict)
    exit_code: int = 0


def carry_out(
    plan: Plan,
    runner: Runner,
    *,
    tell: Callable[[str], None],
    show: Callable[[Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Do all steps that are not finished.

    Args:
        plan: See `make_plan`.
        runner: Runs the commands.
        tell: Gets a line for every step that ends.
        show: Is called whenever the table has become another.
        clock: Seconds.
    """
    outcome = Outcome()
    forecast = _Forecast(plan)
    finished = sum(step.is_finished() for step in plan.steps)
    if finished:
        tell(f"{finished} of {len(plan.steps)} steps were finished before")
    for number, step in enumerate(plan.steps, 1):
        if step.is_finished():
            continue
        if step.needs is not None and not step.needs.exists():
            _note_missing(outcome, step, step.needs.parent)
            continue
        started = clock()
        code = EXIT_STOPPED if runner.signum is not None else _run(step, runner)
        if runner.signum is not None or code == EXIT_STOPPED:
            # A child that was stopped by someone else stops the sweep: a machine that is wanted
            # for something else is not to get the next run.
            is_interrupt = runner.signum == signal.SIGINT
            outcome.exit_code = EXIT_INTERRUPTED if is_interrupt else EXIT_STOPPED
            break
        seconds = clock() - started
        where = f"[{number}/{len(plan.steps)}] {step.title}"
        if code == 0 and step.is_finished():
            forecast.note(step, seconds)
            tell(f"{where}: {as_duration(seconds)}; {forecast.rest(plan.steps[number:])}")
        else:
            failure = Failure(step.title, reason_of(code, step.log), step.log)
            _fail(outcome, step, failure)
            tell(f"{where}: FAILED ({failure.reason}); see {step.log}")
        _remove_features(plan, step)
        show(outcome)
    if outcome.failures and outcome.exit_code == 0:
        outcome.exit_code = 1
    show(outcome)
    return outcome


@contextmanager
def only_one(output: Path) -> Iterator[IO[str]]:
    """The folder of a sweep, made, and for this process alone; yields the lock.

    Raises:
        TrainerError: another sweep is at work there, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise TrainerError(
            f"the folder {output} cannot be made or written ({error.strerror}); choose another "
            "--output"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainerError(
                f"another sweep is at work in {output}; wait for it, or choose another --output"
            ) from error
        yield file


def training_seconds(step: Step) -> float:
    """What the steps of a run took, from its records; 0 where there are none."""
    records = read_metrics(step.product.parent)
    return float(sum(record["seconds_per_step"] for record in records))


def as_duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _run(step: Step, runner: Runner) -> int:
    if step.record is not None:
        step.record.write(step.product.parent)
    return runner.run(step.to_run(), step.log)


def _fail(outcome: Outcome, step: Step, failure: Failure) -> None:
    outcome.failures.setdefault(step.row, []).append(failure)


def _note_missing(outcome: Outcome, step: Step, run: Path) -> None:
    """A row without a run of its own fails where the full one did; others have said why."""
    if run.parent.name == step.row:
        return
    title = f"{step.row} seed-{step.seed}"
    if all(failure.title != title for failure in outcome.failures.get(step.row, ())):
        reason = f"there is no refined backbone of {run.parent.name} {run.name}"
        _fail(outcome, step, Failure(title, reason, None))


def _remove_features(plan: Plan, step: Step) -> None:
    if step.scratch is None:
        return
    if all(other.is_finished() for other in plan.steps if other.scratch == step.scratch):
        shutil.rmtree(step.scratch, ignore_errors=True)


class _Forecast:
    """How long the rest will take, by what steps of the same kind took."""

    def __init__(self, plan: Plan) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}
        for step in plan.steps:
            if step.is_finished():
                self.note(step, _seconds_before(step))

    def note(self, step: Step, seconds: float) -> None:
        if seconds > 0:
            self._seconds.setdefault(_kind(step), []).append(seconds)

    def rest(self, steps: tuple[Step, ...]) -> str:
        """Of the steps that are not finished among these."""
        left = [step for step in steps if not step.is_finished()]
        if not left:
            return "all done"
        known = [self._seconds[_kind(step)] for step in left if _kind(step) in self._seconds]
        seconds = sum(sum(took) / len(took) for took in known)
        if not known:
            return f"{len(left)} steps left"
        more = "" if len(known) == len(left) else "at least "
        return f"{more}{as_duration(seconds)} left"


def _kind(step: Step) -> tuple[str, str]:
    return step.kind, "" if step.measure is None else f"{step.measure.kind} {step.measure.title}"


def _seconds_before(step: Step) -> float:
    if step.needs is None:
        return training_seconds(step)
    result = read_result(step.product, step.needs)
    return 0.0 if result is None else result.seconds
