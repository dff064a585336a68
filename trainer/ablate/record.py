"""What a run in the folder of a sweep was made with, so that no other one is taken for it."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from backbone import is_artifact
from backbone.artifact import read_manifest
from backbone.errors import ArtifactError
from trainer.config import BackboneSection, Recipe
from trainer.errors import CheckpointError
from trainer.evaluate import results
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.files import replace_file
from trainer.evaluate.results import Result
from trainer.loop import checkpoint_path
from trainer.place import ARTIFACT_FOLDER
from trainer.run import CHANGES_NO_NUMBER

RECORD_FILE = "ablation.json"

_SAMPLED_BYTES = 2**24
"""Of each end of a file: weights that were trained again differ everywhere."""


class RunRecord(BaseModel):
    """Recipe, images and raw weights of a run.

    Attributes:
        recipe: Every value that decides what a run computes.
        images: Fingerprint of the images' names and sizes in bytes.
        found: How many images there were to choose from.
        weights: Fingerprint of the backbone's files; None of those that are fetched by name, which
            are the same wherever they are fetched, and in records of before this was kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: dict[str, JsonValue]
    images: str
    found: int
    weights: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, *, images: str, found: int, weights: str | None) -> "RunRecord":
        """The record of a run that is to be made."""
        values = _decisive(recipe.model_dump(mode="json", exclude={"name"}))
        return cls(recipe=values, images=images, found=found, weights=weights)

    def write(self, folder: Path) -> None:
        """Put it into a run's folder, which is made; the trainer must not have begun there."""
        replace_file(folder / RECORD_FILE, (self.model_dump_json(indent=2) + "\n").encode())


def weights_fingerprint(section: BackboneSection) -> str | None:
    """Of the sizes and ends of the files that a recipe's backbone is read from, if they are here.

    Files of tens of gigabytes are not read whole for it.
    """
    named = (section.name.removeprefix("local-dir:"), section.weights)
    files: list[Path] = []
    for path in (Path(name) for name in named if name):
        files += sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    found = [path for path in files if path.is_file() and _decides(path)]
    for path in found:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest() if found else None


def _decides(path: Path) -> bool:
    """Cards and pictures of a model may be written anew, and its recorded results."""
    return path.suffix not in (".md", ".png") and path.name != "refinery.json"


def is_stale(result: Result, artifact: Path) -> bool:
    """Whether a result is of other weights than an artifact has now, which was made anew."""
    digests = {row.digest for row in result.rows if row.digest}
    try:
        return bool(digests) and read_manifest(artifact).digest not in digests
    except ArtifactError:
        return False  # there is nothing yet that it could be of


def read_result(product: Path, artifact: Path) -> Result | None:
    """The result of an evaluation; None where it is not there, damaged, or of other weights."""
    try:
        result = results.read(product)
    except EvaluationError:
        return None
    return None if is_stale(result, artifact) else result


def has_run(folder: Path) -> bool:
    """Whether a run was begun in a folder, to its first checkpoint at least."""
    return checkpoint_path(folder).exists() or (folder / ARTIFACT_FOLDER).exists()


def is_finished(folder: Path) -> bool:
    """Whether a run is done: its artifact is written last, and at once."""
    return is_artifact(folder / ARTIFACT_FOLDER)


def check_same_run(folder: Path, wanted: RunRecord) -> None:
    """Refuse the folder of another run.

    Raises:
        CheckpointError: a run stands there that was made with something else, or by hand.
    """
    if not has_run(folder):
        return
    path = folder / RECORD_FILE
    try:
        found = RunRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{folder} holds a run without a readable {RECORD_FILE}, so that nobody knows what it "
            "was made with; move the folder away, or choose another --output"
        ) from error
    changed = sorted(_differences(_decisive(found.recipe), wanted.recipe))
    if changed:
        raise CheckpointError(
            f"the run in {folder} was made with other values ({', '.join(changed)}); give the "
            "same recipe and settings, move the folder away, or choose another --output"
        )
    if None not in (found.weights, wanted.weights) and found.weights != wanted.weights:
        raise CheckpointError(
            f"the run in {folder} was made with other weights of the same name (the backbone's "
            "files have changed since); move the folder away, or choose another --output"
        )
    if (found.images, found.found) != (wanted.images, wanted.found):
        raise CheckpointError(
            f"the run in {folder} was made with other images (names, sizes or number differ); give "
            "those, move the folder away, or choose another --output"
        )


def _decisive(recipe: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The values that decide what a run computes; a record may have been written with others."""
    return {
        section: {
            name: value
            for name, value in values.items()
            if name not in CHANGES_NO_NUMBER.get(section, ())
        }
        if isinstance(values, dict)
        else values
        for section, values in recipe.items()
    }


def _differences(
    old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], prefix: str = ""
) -> Iterator[str]:
    """`section.key old -> new` of every value that differs."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} {before} there, {after} here"
