"""A run from images to artifact: prepare, train, merge, write.

    OUTPUT/refined/         the artifact
    OUTPUT/metrics.jsonl    a record per step
    OUTPUT/checkpoint.pt    to resume from
    OUTPUT/tensorboard/     where it was asked for

Dimension key: I = images of the channel bank, n = tokens taken of each, C = channels.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from backbone import Backbone, RegisterBorder, has_bf16_matrix_units, save_artifact
from backbone.artifact import weights_digest
from backbone.errors import ImageError, ImageSizeError
from backbone.preprocess import normalize
from backbone.registers import strip, surround
from trainer.card import model_card
from trainer.channels import find_channel_mask
from trainer.checkpoint import check_same_run
from trainer.config import Recipe
from trainer.crops import strip_width
from trainer.data import BadImages, ImageFolder, square_image
from trainer.errors import DataError
from trainer.loop import Identity, Loop, StopRequest
from trainer.lora import Adapter
from trainer.place import ARTIFACT_FOLDER, find_checkpoint, make_folder
from trainer.preview import draw_preview
from trainer.record import memory_gib, read_metrics
from trainer.reference_image import SHIPPED
from trainer.refiner import Refiner

logger = logging.getLogger(__name__)

# Recipe fields that change no number of a run: a resumed run may have others.
_FREE_TO_CHANGE = {
    "backbone": {"name", "weights"},  # the digest of the weights is compared instead
    "data": {"workers"},
    "run": {
        "checkpoint_every",
        "gradient_checkpointing",
        "log_every",
        "preview_images",
        "tensorboard",
        "weights_dtype",
    },
}
# Values of the last steps are averaged into the artifact's metrics.
_METRIC_STEPS = 20


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
) -> Summary:
    """Refine a backbone.

    Raises:
        TrainerError, ModelError, ImageError: what the user can mend.
        Interrupted: the run was asked to stop; it can be resumed.
    """
    checkpoint = find_checkpoint(output, images, resume=resume)
    folder = ImageFolder.scan(images, seed=recipe.run.seed, max_images=recipe.data.max_images)
    bad = BadImages(skip=skip_bad_images)
    backbone = _load_backbone(recipe)
    size = _training_size(recipe, backbone)
    reference = _reference(recipe, size)
    make_folder(output)
    identity = Identity(
        recipe=_comparable(recipe),
        data=folder.fingerprint(),
        weights=weights_digest(backbone.vit.state_dict()),
    )
    bf16 = _uses_bf16(recipe, device)
    backbone.to(device)
    if checkpoint is not None:
        check_same_run(checkpoint, **identity.__dict__)
        channels = checkpoint.channels
    else:
        channels = _channel_mask(backbone, recipe, folder, bad, size=size, bf16=bf16)

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
    ).to(device)
    loop = Loop(refiner, recipe, folder, bad, output=output, identity=identity)
    if checkpoint is not None:
        loop.restore(checkpoint)
    logger.info(
        "refining %s at %d px on %s in %s: %d images, %d steps of %d, from step %d; "
        "border of %d, %d trained parameters, channels masked: %s",
        backbone.name,
        size,
        device,
        "bf16" if bf16 else "fp32",
        len(folder),
        loop.num_steps,
        recipe.global_batch,
        loop.progress.step,
        refiner.width,
        sum(p.numel() for p in refiner.parameters() if p.requires_grad),
        channels or "none",
    )
    loop.train(stop, console)
    metrics = _final_metrics(output)
    _write_artifact(loop, adapter, output / ARTIFACT_FOLDER, metrics, bf16=bf16)
    return Summary(
        artifact=output / ARTIFACT_FOLDER,
        num_steps=loop.progress.step,
        num_images=len(folder),
        num_skipped=len(bad.paths),
        seconds=loop.progress.seconds,
        memory_gib=memory_gib(device),
        channels=list(channels),
        precision="bf16" if bf16 else "fp32",
        metrics=metrics,
    )


def _load_backbone(recipe: Recipe) -> Backbone:
    section = recipe.backbone
    with torch.random.fork_rng(devices=[]):
        # Random weights are not in the checkpoint either: a resumed run must draw the same again.
        torch.manual_seed(recipe.run.seed)
        return Backbone.load(
            section.name,
            weights=Path(section.weights) if section.weights else None,
            random_weights=section.random_weights,
            dense_norm=section.dense_norm,
        )


def _training_size(recipe: Recipe, backbone: Backbone) -> int:
    height, width = backbone.native_size
    if recipe.data.size is None and height != width:
        raise ImageSizeError(
            f"{backbone.name} is made for {height}x{width} px, and training images are square; "
            "set data.size"
        )
    size = recipe.data.size or height
    side, _ = backbone.grid(size, size)
    strip = strip_width(side, recipe.crops.strip_share)
    if strip > side:
        raise ImageSizeError(
            f"an image of {size}x{size} px is {side} patches wide, and the reference strip beside "
            f"its crops {strip}; set data.size higher or crops.strip_share lower"
        )
    return size


def _uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    asked = recipe.run.precision
    return has_bf16_matrix_units(device) if asked == "auto" else asked == "bf16"


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    for section, names in _FREE_TO_CHANGE.items():
        for name in names:
            del values[section][name]
    del values["name"]
    return values


def _reference(recipe: Recipe, size: int) -> Tensor:
    path = Path(recipe.crops.reference) if recipe.crops.reference else SHIPPED
    try:
        return square_image(path, size=size, section=recipe.data)
    except OSError as error:
        raise DataError(f"the reference image {path} cannot be read: {error}") from error


def _readable(
    folder: ImageFolder, order: list[int], recipe: Recipe, bad: BadImages, *, size: int, count: int
) -> Tensor:
    """The first `count` readable images of an order, uint8 [I, 3, size, size]."""
    images: list[Tensor] = []
    for index in order:
        if len(images) == count:
            break
        path = folder.files[index]
        try:
            images.append(square_image(path, size=size, section=recipe.data))
        except (ImageError, OSError) as error:
            bad.meet(path, error)
    if not images:
        raise DataError(f"not one of {len(folder)} images could be read")
    return torch.stack(images)


@torch.no_grad()
def _encode(backbone: Backbone, images_I3SS: Tensor, *, batch: int, bf16: bool) -> Tensor:
    """Raw tokens of images, without border, float32 on the CPU."""
    device = next(backbone.parameters()).device
    tokens = []
    for chunk in torch.split(images_I3SS, batch):
        pixels = normalize(chunk.to(device), mean=backbone.mean, std=backbone.std)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            tokens.append(backbone.encode(pixels).tokens.float().cpu())
    return torch.cat(tokens)


def _channel_mask(
    backbone: Backbone,
    recipe: Recipe,
    folder: ImageFolder,
    bad: BadImages,
    *,
    size: int,
    bf16: bool,
) -> list[int]:
    section = recipe.channels
    if section.max_channels == 0:
        return []
    order = folder.order(0, recipe.run.seed)
    images = _readable(folder, order, recipe, bad, size=size, count=section.num_images)
    if len(images) < 2:
        logger.warning("no channel mask: it needs two images, and there is one")
        return []
    tokens_INC = _encode(backbone, images, batch=recipe.data.batch_size, bf16=bf16)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    picks_INn = torch.rand(tokens_INC.shape[:2], generator=generator).argsort(dim=-1)
    picks_In = picks_INn[:, : section.num_tokens]
    found = find_channel_mask(
        tokens_INC.take_along_dim(picks_In[..., None], dim=1),
        max_channels=section.max_channels,
        threshold=section.threshold,
        min_gain=section.min_gain,
        candidate_pool=section.candidate_pool,
    )
    logger.info(
        "channel mask %s from %d images: cross-image cosine %.3f, stopped by %s",
        found.channels,
        len(images),
        found.cosine,
        found.stop_reason,
    )
    return found.channels


def _final_metrics(output: Path) -> dict[str, float]:
    """Means over the last steps of what a run recorded."""
    last = read_metrics(output)[-_METRIC_STEPS:]
    names = [name for name in last[-1] if name != "step"] if last else []
    return {
        name: sum(record[name] for record in last if name in record)
        / sum(name in record for record in last)
        for name in names
    }


def _write_artifact(
    loop: Loop, adapter: Adapter, folder: Path, metrics: dict[str, float], *, bf16: bool
) -> None:
    refiner, recipe = loop.refiner, loop.recipe
    backbone, size = refiner.backbone, refiner.size
    refiner.eval()
    learned = None if refiner.border is None else refiner.border.cpu()
    border = RegisterBorder(
        r_reg=recipe.registers.r_reg,
        rounding=recipe.registers.rounding,
        fill=recipe.registers.fill,
        seed=recipe.registers.seed,
    )
    with adapter.off():
        count = recipe.run.preview_images
        order = list(range(len(loop.folder)))
        images = _readable(loop.folder, order, recipe, loop.bad, size=size, count=count)
        raw = _encode(backbone, images, batch=recipe.data.batch_size, bf16=bf16)
    pixels = border.pixels(refiner.canvas, refiner.width, learned)
    refined = _encode_refined(refiner, images, pixels, bf16=bf16)
    data = {
        "fingerprint": loop.identity.data,
        "images": len(loop.folder),
        "found": loop.folder.num_found,
        "skipped": len(loop.bad.paths),
        "images_seen": loop.progress.step * recipe.global_batch,
    }
    with tempfile.TemporaryDirectory() as scratch:
        adapter.save(Path(scratch))
        adapter.merge()
        save_artifact(
            folder,
            backbone,
            border=border,
            model_card=model_card(loop, metrics),
            native_size=(size, size),
            channel_mask=() if refiner.channels is None else tuple(refiner.channels.tolist()),
            recipe=recipe.model_dump(mode="json"),
            data=data,
            metrics=metrics,
            weights_dtype=getattr(torch, recipe.run.weights_dtype),
            learned_border=learned,
            adapter=Path(scratch),
            preview=draw_preview(images, raw, refined, refiner.grid),
        )


@torch.no_grad()
def _encode_refined(refiner: Refiner, images_I3SS: Tensor, border: Tensor, *, bf16: bool) -> Tensor:
    """Tokens as they will be served, float32 on the CPU."""
    backbone, device = refiner.backbone, refiner.reference_13SS.device
    tokens = []
    for image in torch.split(images_I3SS, 1):
        pixels = normalize(image.to(device), mean=backbone.mean, std=backbone.std)
        canvas = surround(
            pixels, border.to(device), width=refiner.width, patch_size=backbone.patch_size
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            features = backbone.encode(canvas)
        tokens.append(strip(features.tokens, refiner.grid, refiner.width).image.float().cpu())
    return torch.cat(tokens)
