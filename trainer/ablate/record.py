"""What a run in the folder of a sweep was made with, so that no other one is taken for it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from backbone import is_artifact
from trainer.config import Recipe
from trainer.errors import CheckpointError
from trainer.loop import checkpoint_path
from trainer.place import ARTIFACT_FOLDER

RECORD_FILE = "ablation.json"

# Fields that change no number of a run: a sweep that goes on may have others.
_FREE = {
    "data": ("workers",),
    "run": (
        "checkpoint_every",
        "gradient_checkpointing",
        "log_every",
        "measure_images",
        "preview_images",
        "snapshot_every",
        "tensorboard",
        "wandb",
    ),
}


class RunRecord(BaseModel):
    """Recipe and images of a run.

    Attributes:
        recipe: Every value that decides what a run computes.
        images: Fingerprint of the images' names and sizes in bytes.
        found: How many images there were to choose from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: dict[str, JsonValue]
    images: str
    found: int

    @classmethod
    def of(cls, recipe: Recipe, *, images: str, found: int) -> "RunRecord":
        """The record of a run that is to be made."""
        values = recipe.model_dump(mode="json", exclude={"name"})
        for section, names in _FREE.items():
            for name in names:
                values[section].pop(name, None)
        return cls(recipe=values, images=images, found=found)

    def write(self, folder: Path) -> None:
        """Put it into a run's folder, which is made; the trainer must not have begun there."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORD_FILE
        written = path.with_name(f".{RECORD_FILE}")
        written.write_text(self.model_dump_json(indent=2) + "\n")
        written.replace(path)


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
    changed = sorted(_differences(found.recipe, wanted.recipe))
    if changed:
        raise CheckpointError(
            f"the run in {folder} was made with other values ({', '.join(changed)}); give the "
            "same recipe and settings, move the folder away, or choose another --output"
        )
    if (found.images, found.found) != (wanted.images, wanted.found):
        raise CheckpointError(
            f"the run in {folder} was made with other images (names, sizes or number differ); give "
            "those, move the folder away, or choose another --output"
        )


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
