"""A run from images to artifact: prepare, train, merge, write, measure.

OUTPUT/refined/         the artifact
OUTPUT/metrics.jsonl    a record per step
OUTPUT/checkpoint.pt    to resume from
OUTPUT/refinery-adapter.json    what the checkpoint's adapter belongs to, see `trainer.merge`
OUTPUT/snapshots/, tensorboard/, wandb/    where they were asked for
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from backbone import save_artifact
from backbone.artifact import weights_digest
from trainer.adapter_file import AdapterDescription, describe, write_extras
from trainer.boards import check_boards
from trainer.card import base_weights, model_card
from trainer.checkpoint import check_same_run, fit_batches
from trainer.config import Recipe
from trainer.data import BadImages, find_images
from trainer.distributed import ALONE, Ranks
from trainer.errors import TrainerError
from trainer.loop import Identity, Loop, StopRequest
from trainer.lora import Adapter
from trainer.measured import measure_artifact
from trainer.place import ARTIFACT_FOLDER, find_checkpoint, make_folder
from trainer.prepare import (
    channel_mask,
    determinism,
    encode_raw,
    encode_surrounded,
    load_backbone,
    readable_images,
    reference_image,
    register_border,
    training_size,
    uses_bf16,
)
from trainer.preview import draw_preview
from trainer.record import final_metrics, memory_gib
from trainer.refiner import Refiner
from trainer.snapshots import Snapshots

logger = logging.getLogger(__name__)

CHANGES_NO_NUMBER: Mapping[str, frozenset[str]] = {
    "data": frozenset({"max_bad_share", "workers"}),
    "run": frozenset(
        {
            "checkpoint_every",
            "gradient_checkpointing",
            "log_every",
            "measure_images",
            "preview_images",
            "snapshot_every",
            "tensorboard",
            "wandb",
        }
    ),
}
"""Recipe fields, by section, that change nothing of an artifact's weights."""

# What a resumed run may have otherwise too.
_FREE_TO_CHANGE: Mapping[str, frozenset[str]] = {
    "backbone": frozenset({"name", "weights"}),  # the weights' digest is compared instead
    # The product of the first two is compared, see fit_batches.
    "data": CHANGES_NO_NUMBER["data"] | {"accumulate", "batch_size"},
    "run": CHANGES_NO_NUMBER["run"] | {"weights_dtype"},  # of what is written at the end
}


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    artifact: Path
    num_steps: int
    num_images: int
    num_skipped: int
    seconds: float
    memory_gib: float
    channels: list[int]
    precision: str
    metrics: dict[str, float]


def refine(
    recipe: Recipe,
    images: Path,
    output: Path,
    *,
    device: torch.device,
    stop: StopRequest,
    console: Console,
    resume: bool = False,
    skip_bad_images: bool = False,
    ranks: Ranks = ALONE,
) -> Summary:
    """Refine a backbone, together with the other processes of `ranks`.

    Raises:
        TrainerError, ModelError, ImageError: what the user can mend.
        PeerError: another process met an error.
        Interrupted: the run was asked to stop; it can be resumed.
    """
    check_boards(recipe.run)
    checkpoint = ranks.from_first(lambda: find_checkpoint(output, images, resume=resume))
    with ranks.agreed():
        if checkpoint is not None:
            recipe = fit_batches(recipe, checkpoint, num_processes=ranks.size)
        folder = find_images(images, seed=recipe.run.seed, max_images=recipe.data.max_images)
        bad = BadImages(skip=skip_bad_images, max_share=recipe.data.max_bad_share)
        bf16 = uses_bf16(recipe, device)
        backbone = load_backbone(recipe)
        size = training_size(recipe, backbone)
        reference = reference_image(recipe, size)
        if ranks.is_first:
            make_folder(output)
        identity = Identity(
            recipe=_comparable(recipe),
            data=folder.fingerprint(),
            weights=weights_digest(backbone.vit.state_dict()),
        )
        if checkpoint is not None:
            check_same_run(checkpoint, **identity.__dict__)
        backbone.to(device)
    _refuse_differences(identity, ranks)
    channels = (
        checkpoint.channels
        if checkpoint is not None
        else ranks.from_first(
            lambda: channel_mask(backbone, recipe, folder, bad, size=size, bf16=bf16)
        )
    )
    with ranks.agreed():
        adapter = Adapter.attach(backbone, recipe.lora, seed=recipe.run.seed)
        if recipe.run.gradient_checkpointing:
            backbone.vit.set_grad_checkpointing()
        refiner = Refiner(
            backbone,
            adapter,
            recipe,
            size=size,
            reference_3SS=reference,
            channels=channels,
            bf16=bf16,
            ranks=ranks,
        ).to(device)
        loop = Loop(refiner, recipe, folder, bad, output=output, identity=identity)
        if checkpoint is not None:
            loop.restore(checkpoint)
        if ranks.is_first:
            _describe(loop).write(output)
            loop.snapshots = Snapshots.of_run(output, refiner, adapter, recipe, folder, bad)
    logger.info(
        "refining %s at %d px on %s in %s, %d process%s: %d images, %d steps of %d, from step %d; "
        "border of %d, %d trained parameters, channels masked: %s",
        backbone.name,
        size,
        device,
        "bf16" if bf16 else "fp32",
        ranks.size,
        "" if ranks.size == 1 else "es",
        len(folder),
        loop.num_steps,
        loop.global_batch,
        loop.progress.step,
        refiner.width,
        sum(p.numel() for p in refiner.parameters() if p.requires_grad),
        channels or "none",
    )
    with determinism(recipe.run.deterministic):
        loop.train(stop, console)
    metrics: dict[str, float] = {}
    peak = memory_gib(device)  # of the training alone
    if ranks.is_first:
        metrics = final_metrics(output)
        _write_artifact(loop, adapter, output / ARTIFACT_FOLDER, metrics, bf16=bf16)
        base, _ = base_weights(loop)
        refiner.to("meta")  # its memory is for what is measured now
        measure_artifact(
            output / ARTIFACT_FOLDER,
            recipe,
            folder,
            bad,
            reference_3SS=reference,
            channels=channels,
            base=base,
            digest=identity.weights,
            device=device,
            bf16=bf16,
            stop=stop,
            console=console,
        )
    return Summary(
        artifact=output / ARTIFACT_FOLDER,
        num_steps=loop.progress.step,
        num_images=len(folder),
        num_skipped=len(bad.paths),
        seconds=loop.progress.seconds,
        memory_gib=peak,
        channels=list(channels),
        precision="bf16" if bf16 else "fp32",
        metrics=metrics,
    )


def _refuse_differences(identity: Identity, ranks: Ranks) -> None:
    """All processes must start from the same, or their adapters would drift apart unseen."""
    first = ranks.from_first(lambda: identity)
    with ranks.agreed():
        for name, cure in (("data", "images"), ("weights", "backbone's weights")):
            if getattr(identity, name) != getattr(first, name):
                raise TrainerError(
                    f"process {ranks.rank} has other {cure} than process 0; give all machines the "
                    "same files"
                )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    for section, names in _FREE_TO_CHANGE.items():
        for name in names:
            del values[section][name]
    del values["name"]
    return values


def _describe(loop: Loop, metrics: dict[str, float] | None = None) -> AdapterDescription:
    """What the run's adapter is for, as far as the run has come."""
    refiner = loop.refiner
    return describe(
        loop.recipe,
        refiner.backbone,
        size=refiner.size,
        digest=loop.identity.weights,
        channels=() if refiner.channels is None else tuple(refiner.channels.tolist()),
        data={
            "fingerprint": loop.identity.data,
            "images": len(loop.folder),
            "found": loop.folder.num_found,
            "skipped": len(loop.bad.paths),
            "images_seen": loop.progress.step * loop.global_batch,
        },
        metrics=metrics,
    )


def _write_artifact(
    loop: Loop, adapter: Adapter, folder: Path, metrics: dict[str, float], *, bf16: bool
) -> None:
    refiner, recipe = loop.refiner, loop.recipe
    backbone, size = refiner.backbone, refiner.size
    refiner.eval()
    learned = None if refiner.border is None else refiner.border.cpu()
    border = register_border(recipe)
    with adapter.off():
        count = recipe.run.preview_images
        order = list(range(len(loop.folder)))
        images = readable_images(loop.folder, order, recipe, loop.bad, size=size, count=count)
        raw = encode_raw(backbone, images, batch=recipe.data.batch_size, bf16=bf16)
    pixels = border.pixels(refiner.canvas, refiner.width, learned)
    refined = encode_surrounded(backbone, images, pixels, width=refiner.width, bf16=bf16)
    description, card = _describe(loop, metrics), model_card(loop, metrics)
    with tempfile.TemporaryDirectory() as scratch:
        adapter.save(Path(scratch))
        write_extras(Path(scratch), description, learned_border=learned, card=card)
        adapter.merge()
        save_artifact(
            folder,
            backbone,
            **description.artifact_arguments(),
            model_card=card,
            learned_border=learned,
            adapter=Path(scratch),
            preview=draw_preview(images, raw, refined, refiner.grid),
        )
