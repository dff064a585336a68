"""The folder of a run: what may stand there already is decided before anything is computed."""

import logging
from pathlib import Path

from backbone import is_artifact
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.errors import CheckpointError, DataError, TrainerError
from trainer.loop import checkpoint_path

logger = logging.getLogger(__name__)

ARTIFACT_FOLDER = "refined"


def find_checkpoint(output: Path, images: Path, *, resume: bool) -> Checkpoint | None:
    """What a run continues from, if anything.

    Raises:
        TrainerError: a run that is written there would cost an earlier one, or could not end.
    """
    path, artifact = checkpoint_path(output), output / ARTIFACT_FOLDER
    if output.resolve().is_relative_to(images.resolve()):
        raise DataError(
            f"{output} lies in {images}, where the run's pictures would become training images; "
            "choose an --output outside of it"
        )
    if artifact.exists() and not is_artifact(artifact):
        raise TrainerError(f"{artifact} exists and is not an artifact; choose another --output")
    if not resume and (path.exists() or artifact.exists()):
        raise CheckpointError(
            f"{output} holds an earlier run; continue it with --resume, or choose another --output"
        )
    if resume and path.is_file():
        return load_checkpoint(path)
    if artifact.exists():
        raise CheckpointError(
            f"{output} holds an artifact, but no checkpoint to resume from; choose another --output"
        )
    if resume:
        logger.warning("no checkpoint in %s: starting from step 0", output)
    return None


def make_folder(output: Path) -> None:
    """Make the folder of a run.

    Raises:
        TrainerError: it is a file, or cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(
            f"the folder {output} cannot be made ({error.strerror}); choose another --output"
        ) from error
