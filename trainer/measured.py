"""What a run measures of its artifact when it is done: spurious tokens and view consistency.

The artifact is there before, whole, and stays so whatever happens here: numbers go into its
manifest and its card file by file, and what goes wrong is a warning.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from backbone import DenseEncoder, open_model
from backbone.encoder import Precision
from trainer.config import Recipe
from trainer.data import BadImages, Source
from trainer.evaluate.layers import OWN
from trainer.evaluate.pictures import read_pictures
from trainer.evaluate.progress import Advance, Progress
from trainer.evaluate.record import record
from trainer.evaluate.results import Result
from trainer.evaluate.subjects import LocalSubject
from trainer.evaluate.unlabelled import SpuriousSettings, evaluate_spurious
from trainer.loop import StopRequest
from trainer.prepare import load_backbone

logger = logging.getLogger(__name__)

DATASET = "training images"


class _Stopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop."""


class _Stoppable(Progress):
    """Ends between two images where a stop is requested; draws a bar, but logs no lines."""

    def __init__(self, stop: StopRequest, console: Console) -> None:
        super().__init__(console if console.is_terminal else None)
        self._stop = stop

    @contextmanager
    def stage(self, title: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        with super().stage(title, total, done=done) as advance:

            def step(count: int) -> None:
                advance(count)
                if self._stop.signum is not None:
                    raise _Stopped

            yield step


def measure_artifact(
    artifact: Path,
    recipe: Recipe,
    images: Source,
    bad: BadImages,
    *,
    reference_3SS: Tensor,
    channels: Sequence[int],
    base: str,
    digest: str,
    device: torch.device,
    bf16: bool,
    stop: StopRequest,
    console: Console,
) -> Result | None:
    """Measure an artifact beside the backbone that it was refined from, and record the result.

    Both are loaded anew, so that what is measured is what will be served.

    Args:
        artifact: Is written.
        recipe: Of the run; `run.measure_images` of its images are taken.
        images, bad: Of the run.
        reference_3SS: The reference image at the size of the training.
        channels: Masked channels.
        base: What the raw weights are called.
        digest: Of the raw weights.
        device: Of the run.
        bf16: The precision of the run.
        stop: Ends the measurement too.
        console: Where a bar is drawn if it is a terminal.

    Returns:
        The result, or None where there is none: it was not wanted, or a warning says why.
    """
    if not recipe.run.measure_images:
        return None
    try:
        if stop.signum is not None:  # asked while the artifact was written: load nothing more
            raise _Stopped
        result = _measure(
            artifact,
            recipe,
            images,
            bad,
            reference_3SS=reference_3SS,
            channels=channels,
            base=base,
            digest=digest,
            device=device,
            bf16=bf16,
            progress=_Stoppable(stop, console),
        )
        record(artifact, result)
    except _Stopped:
        logger.warning("stopped before the artifact was measured; %s", _later(artifact))
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is done and its result whole
        logger.warning(
            "the artifact was not measured: %s: %s; %s",
            type(error).__name__,
            error,
            _later(artifact),
        )
        return None
    logger.info("measured %s", _in_words(result))
    return result


def _measure(
    artifact: Path,
    recipe: Recipe,
    images: Source,
    bad: BadImages,
    *,
    reference_3SS: Tensor,
    channels: Sequence[int],
    base: str,
    digest: str,
    device: torch.device,
    bf16: bool,
    progress: Progress,
) -> Result:
    precision: Precision = "bf16" if bf16 else "fp32"
    refined = open_model(artifact, device=device, precision=precision)
    backbone = load_backbone(recipe, dtype=torch.bfloat16 if bf16 else None)
    raw = DenseEncoder(backbone, digest=digest, device=device, precision=precision)
    pictures = read_pictures(
        images,
        images.order(0, recipe.run.seed),
        recipe,
        bad,
        reference_3SS=reference_3SS,
        patch_size=refined.patch_size,
        count=recipe.run.measure_images,
    )
    fp_gp = recipe.filters.fp_gp
    result = evaluate_spurious(
        [
            LocalSubject(raw, name="raw", spec=base),
            LocalSubject(refined, name="refined", spec="this artifact"),
        ],
        pictures,
        SpuriousSettings(
            # What the run took for spurious is what is counted.
            threshold=fp_gp.threshold if fp_gp.criterion == "cosine" else 0.5,
            sigma=fp_gp.threshold if fp_gp.criterion == "zscore" else None,
            strip_share=recipe.crops.strip_share,
        ),
        dataset=DATASET,
        channels=channels,
        progress=progress,
    )
    command = f"python -m trainer --set run.measure_images={recipe.run.measure_images}"
    return result.model_copy(update={"command": command})


def _in_words(result: Result) -> str:
    spurious, margin = "FP or GP", "view margin (shift)"
    raw, refined = (
        {score.name: score.interval.mean for score in row.scores} for row in result.rows[:2]
    )
    return (
        f"{raw[spurious]:.1f} % of the raw tokens are spurious, {refined[spurious]:.1f} % of the "
        f"refined ones by the same patterns ({refined[OWN + spurious]:.1f} % by their own); view "
        f"margin {raw[margin]:.3f} and {refined[margin]:.3f}"
    )


def _later(artifact: Path) -> str:
    return (
        f"it is whole, and python -m trainer.evaluate spurious --model {artifact} --images DIR "
        "--record measures it"
    )
