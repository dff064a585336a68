"""What a sweep will do, as a list of commands in their order.

A step is finished when its product is there, so that the same sweep, started again, goes on.

    OUTPUT/no-uni/seed-0/refined                            a run's artifact
    OUTPUT/no-uni/seed-0/segmentation-camvid-5f1c2a9e.json  measured, with flags of that digest
    OUTPUT/full/seed-0/served-width-2/...json               the full run, served with a wider border

The raw backbone is measured beside the full run of the first seed: only an artifact says all that
its raw features depend on.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.ablate.measures import Measure
from trainer.ablate.record import (
    RunRecord,
    check_same_run,
    has_run,
    is_finished,
    read_result,
    weights_fingerprint,
)
from trainer.ablate.resolve import RecipeSource, ResolvedVariant
from trainer.ablate.variants import FULL
from trainer.config import BackboneSection, Recipe
from trainer.data import find_images
from trainer.errors import CheckpointError, DataError, RecipeError
from trainer.place import ARTIFACT_FOLDER


@dataclass(frozen=True)
class SweepSettings:
    """What the user asked for.

    Attributes:
        source: The recipe that is ablated.
        images: Training images.
        output: Folder of the sweep.
        num_seeds: Runs of every variant, seeds from the recipe's `run.seed` on.
        num_probe_seeds: Probes of every run, seeds from 0 on.
        measures: What every row is measured by.
        device: For training and evaluation; None: each one's default.
        skip_bad_images: As for the trainer.
        features: Folder for features; None: one per row in OUTPUT, which is removed when the row
            is measured; "none": they stay in memory.
    """

    source: RecipeSource
    images: str
    output: Path
    num_seeds: int = 1
    num_probe_seeds: int = 3
    measures: tuple[Measure, ...] = ()
    device: str | None = None
    skip_bad_images: bool = False
    features: str | None = None

    @property
    def seeds(self) -> range:
        first = self.source.full.run.seed
        return range(first, first + self.num_seeds)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        row: Name of the row that it is for.
        seed: Of the training run.
        kind: What is done.
        title: What it is called in messages.
        command: Words; an evaluation writes `product` at once, when it is done.
        log: Takes what the command says.
        product: Exists when the step is finished.
        needs: Artifact that an evaluation measures.
        scratch: Folder of features that is removed when all steps with it are finished.
        record: Of a training run.
    """

    row: str
    seed: int
    kind: Literal["training", "evaluation"]
    title: str
    command: tuple[str, ...]
    log: Path
    product: Path
    needs: Path | None = None
    measure: Measure | None = None
    scratch: Path | None = None
    record: RunRecord | None = field(default=None, repr=False)

    def is_finished(self) -> bool:
        """Whether its product is there; of an evaluation, of the weights that are there now."""
        if self.needs is None:
            return is_finished(self.product.parent)
        return read_result(self.product, self.needs) is not None

    def to_run(self) -> list[str]:
        """The command as it has to be given now: a run that was begun is resumed."""
        if self.kind == "training":
            begun = has_run(self.product.parent)
            return [*self.command, *(["--resume"] if begun else [])]
        return list(self.command)


@dataclass(frozen=True)
class Plan:
    """Rows in the order of the table, and what is done for them."""

    settings: SweepSettings
    rows: tuple[ResolvedVariant, ...]
    steps: tuple[Step, ...]

    def of(self, row: str) -> list[Step]:
        return [step for step in self.steps if step.row == row]


def make_plan(settings: SweepSettings, rows: Sequence[ResolvedVariant]) -> Plan:
    """List all steps; nothing is computed or written.

    Raises:
        CheckpointError: the folder of a run holds another one.
        DataError: there are no images, or OUTPUT lies among them.
        RecipeError: the recipe trains random weights.
    """
    if settings.source.full.backbone.random_weights:
        raise RecipeError(
            "backbone.random_weights is true: there is no raw backbone to compare with; save the "
            "weights as a folder in timm's format, and name it in backbone.name"
        )
    _refuse_nested(settings)
    planner = _Planner(settings)
    steps: list[Step] = []
    for row in rows:
        if row.recipe is None:
            continue
        for seed in settings.seeds:
            if row.variant.served_width is None:
                steps.append(planner.training(row, row.recipe, seed))
            steps += planner.evaluations(row, seed)
    return Plan(settings, tuple(rows), tuple(steps))


def check_runs(plan: Plan) -> None:
    """Refuse, before anything is computed, folders that hold other runs.

    Raises:
        CheckpointError: one does.
    """
    problems = []
    for step in plan.steps:
        if step.record is not None:
            try:
                check_same_run(step.product.parent, step.record)
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more such folders)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)


def _refuse_nested(settings: SweepSettings) -> None:
    inner, outer = settings.output.resolve(), Path(settings.images).resolve()
    if inner.is_relative_to(outer):
        raise DataError(
            f"{settings.output} lies in {settings.images}, where pictures of the runs would become "
            "training images; choose an --output outside of it"
        )


class _Planner:
    """Makes the steps of one sweep."""

    def __init__(self, settings: SweepSettings) -> None:
        self._settings = settings
        self._images: dict[tuple[int, int | None], tuple[str, int]] = {}
        self._weights: dict[BackboneSection, str | None] = {}

    def training(self, row: ResolvedVariant, recipe: Recipe, seed: int) -> Step:
        settings, folder = self._settings, self._folder(row.name, seed)
        name, method = settings.source.laid_on(row.variant.method)
        words = ["--recipe", name, *(["--variant", method] if method else [])]
        for setting in (*settings.source.settings, *row.settings, f"run.seed={seed}"):
            words += ["--set", setting]
        words += ["--images", settings.images, "--output", str(folder)]
        words += ["--skip-bad-images"] if settings.skip_bad_images else []
        run = recipe.run.model_copy(update={"seed": seed})
        recipe = recipe.model_copy(update={"run": run})
        images, found = self._images_of(seed, recipe.data.max_images)
        return Step(
            row=row.name,
            seed=seed,
            kind="training",
            title=f"{row.name} seed-{seed} training",
            command=self._python("trainer", words),
            log=folder / "training.log",
            product=folder / ARTIFACT_FOLDER,
            record=RunRecord.of(
                recipe, images=images, found=found, weights=self._weights_of(recipe.backbone)
            ),
        )

    def evaluations(self, row: ResolvedVariant, seed: int) -> Iterator[Step]:
        """Of one run by every measure."""
        settings, width = self._settings, row.variant.served_width
        run = self._folder(row.name if width is None else FULL, seed)
        folder = run if width is None else run / row.name
        for measure in settings.measures:
            options = [] if width is None else ["--register-width", str(width)]
            # Probes of the raw backbone once; of spurious tokens it says which patterns count.
            if measure.is_probe and (row.name, seed) != (FULL, settings.seeds[0]):
                options += ["--baseline", "none"]
            yield self._evaluation(row.name, seed, measure, options, folder, run / ARTIFACT_FOLDER)

    def _evaluation(
        self,
        row: str,
        seed: int,
        measure: Measure,
        options: Sequence[str],
        folder: Path,
        artifact: Path,
    ) -> Step:
        settings, scratch = self._settings, None
        words = [*measure.arguments(settings.source.size), *options]
        if measure.is_probe:
            words += ["--seeds", str(settings.num_probe_seeds)]
        # Of what decides the result, wherever the folder of the sweep lies.
        decisive = [str(measure.folder.resolve()) if w == str(measure.folder) else w for w in words]
        words += ["--model", str(artifact)]
        if measure.is_probe:
            if settings.features is None:
                scratch = settings.output / "features" / f"{row}-seed-{seed}"
            words += ["--features", settings.features or str(scratch)]
        # Other flags are another measurement: it gets a file of its own, and none is reused.
        digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{measure.kind}-{measure.title}").strip("-")
        product = folder / f"{name}-{digest}.json"
        return Step(
            row=row,
            seed=seed,
            kind="evaluation",
            title=f"{row} seed-{seed} {measure.kind} {measure.title}",
            command=self._python("trainer.evaluate", [*words, "--json", str(product)]),
            log=product.with_suffix(".log"),
            product=product,
            needs=artifact,
            measure=measure,
            scratch=scratch,
        )

    def _python(self, module: str, words: Sequence[str]) -> tuple[str, ...]:
        device = self._settings.device
        place = [] if device is None else ["--device", device]
        return (sys.executable, "-m", module, *words, *place)

    def _folder(self, row: str, seed: int) -> Path:
        return self._settings.output / row / f"seed-{seed}"

    def _images_of(self, seed: int, max_images: int | None) -> tuple[str, int]:
        """The fingerprint and number of the images that a run with this seed chooses from."""
        key = (seed, max_images)
        if key not in self._images:
            found = find_images(self._settings.images, seed=seed, max_images=max_images)
            self._images[key] = (found.fingerprint(), found.num_found)
        return self._images[key]

    def _weights_of(self, section: BackboneSection) -> str | None:
        if section not in self._weights:
            self._weights[section] = weights_fingerprint(section)
        return self._weights[section]
