"""Pre-train the demo backbone from scratch, without labels, on a folder of photographs.

    python -m examples.demo_backbone.pretrain --images PHOTOS --output DIR --minutes 50
    python -m examples.demo_backbone.pretrain --images PHOTOS --output NEXT --minutes 50 --start DIR

Writes a folder that `timm.create_model("local-dir:DIR", pretrained=True)` loads. With `--minutes`
the learning rate and the resolution follow the clock, so that the run ends on time on any machine;
with `--steps` they follow the step count, so that the run can be repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.layers.config import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from examples.demo_backbone.export import save_timm_folder
from examples.demo_backbone.objective import Losses, LossWeights, Objective
from examples.demo_backbone.views import (
    PIXEL_MEAN,
    PIXEL_STD,
    Views,
    ViewSampler,
    border_some,
    jitter_and_normalise,
    load_photos,
    patch_centres,
)

logger = logging.getLogger("pretrain")

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH_SIZE = 16
SHORT_SIDE = 320
LEARNING_RATE = 1.5e-3
LATER_LEARNING_RATE = 1e-3  # of a run that starts from weights: what they know must survive it
WEIGHT_DECAY = 0.05
WARM_UP = 0.04
CLIP_NORM = 3.0
CHECKPOINT_SECONDS = 300.0
LOG_STEPS = 25
LOSS_NAMES = ("total", "masked", "scene", "place", "spread")


class Stage(NamedTuple):
    """A part of training, up to the fraction `until` of the budget."""

    until: float
    side: int
    visible_fraction: float
    num_photos: int


# Small views first: they teach most per second. The last stage is at the backbone's own resolution.
STAGES = (Stage(0.5, 128, 0.5, 128), Stage(0.82, 160, 0.5, 96), Stage(math.inf, 224, 0.5, 64))
# Of a run that starts from weights, up to grids of the size that dense features are asked for.
LATER_STAGES = (Stage(0.45, 160, 0.5, 96), Stage(0.8, 224, 0.5, 64), Stage(math.inf, 320, 0.5, 32))


class Budget:
    """How much of the run is done, by the clock or by steps."""

    def __init__(self, *, minutes: float | None, steps: int | None, spent_seconds: float) -> None:
        self._minutes = minutes
        self._steps = steps
        self._start = time.monotonic() - spent_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """0 at the start, 1 or more when the budget is spent."""
        if self._steps is not None:
            return step / self._steps
        assert self._minutes is not None
        return self.seconds / (60.0 * self._minutes)


class Schedule(NamedTuple):
    """What follows the budget: views and learning rate."""

    stages: tuple[Stage, ...]
    peak: float

    def stage(self, progress: float) -> Stage:
        return next(stage for stage in self.stages if progress < stage.until)

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up, then a cosine to zero."""
        if progress < WARM_UP:
            return self.peak * progress / WARM_UP
        phase = min(1.0, (progress - WARM_UP) / (1.0 - WARM_UP))
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * phase))


def build_encoder(start: Path | None) -> VisionTransformer:
    """The architecture with random weights or those of a folder.

    What is built after it shares its attention kernels.
    """
    # On a CPU the backward of fused attention is slower than the three plain operations for
    # sequences this short: 265 against 445 views per second at 33 tokens on two AMX cores.
    set_fused_attn(False)
    name = ARCHITECTURE if start is None else f"local-dir:{start}"
    encoder = timm.create_model(name, pretrained=start is not None, num_classes=0)
    assert isinstance(encoder, VisionTransformer)
    return encoder


def build_optimizer(modules: Sequence[nn.Module]) -> torch.optim.AdamW:
    """AdamW without decay on tensors of fewer than two dimensions and on embeddings."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_embedding = name.endswith(("pos_embed", "cls_token", "position", "hidden_token"))
            (plain if parameter.ndim < 2 or is_embedding else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


class Trainer:
    """Everything that changes during the run, and its checkpoint."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.encoder = build_encoder(arguments.start)
        self.objective = Objective(
            self.encoder.embed_dim,
            patch_size=PATCH_SIZE,
            base_grid=224 // PATCH_SIZE,
            weights=LossWeights(*arguments.weights),
        )
        if arguments.start is not None and (arguments.start / "checkpoint.pt").is_file():
            state = torch.load(arguments.start / "checkpoint.pt", weights_only=True)
            self.objective.load_state_dict(state["objective"])
            logger.info("the losses' heads continue from %s", arguments.start / "checkpoint.pt")
        self.optimizer = build_optimizer([self.encoder, self.objective])
        self.border_share: float = arguments.border_share
        self.step = 0
        self.views_seen = 0

    def update(self, views: Views, *, visible_fraction: float, learning_rate: float) -> Losses:
        """One optimiser step on one batch of view pairs."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        pixels_V3SS = jitter_and_normalise(views.pixels_V3SS, self.generator)
        centre_VN2, patch_side_V = patch_centres(views.plan, PATCH_SIZE)
        seen_V3SS, centre_VN2 = border_some(
            pixels_V3SS,
            centre_VN2,
            share=self.border_share,
            patch_size=PATCH_SIZE,
            generator=self.generator,
        )
        losses: Losses = self.objective(
            self.encoder,
            pixels_V3SS,
            seen_V3SS,
            centre_VN2,
            patch_side_V,
            visible_fraction=visible_fraction,
            generator=self.generator,
        )
        if not torch.isfinite(losses.total):
            raise FloatingPointError(f"loss is not finite at step {self.step}: {losses}")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        parameters = [*self.encoder.parameters(), *self.objective.parameters()]
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.optimizer.step()
        self.step += 1
        self.views_seen += len(pixels_V3SS)
        return losses

    def save(self, path: Path, *, spent_seconds: float) -> None:
        state = {
            "encoder": self.encoder.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "views_seen": self.views_seen,
            "spent_seconds": spent_seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> float:
        """Continue from a checkpoint; returns the seconds already spent."""
        state = torch.load(path, weights_only=True)
        self.encoder.load_state_dict(state["encoder"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])
        self.views_seen = int(state["views_seen"])
        return float(state["spent_seconds"])


def train(
    trainer: Trainer,
    sampler: ViewSampler,
    budget: Budget,
    schedule: Schedule,
    checkpoint: Path,
) -> dict[str, float]:
    """Train until the budget is spent; returns the mean of each loss over the last interval."""
    sums = torch.zeros(5)
    count = 0
    means: dict[str, float] = {}
    saved_at = budget.seconds
    stage = schedule.stage(budget.progress(trainer.step))
    upcoming = sampler.prefetch(stage.num_photos, stage.side)
    while (progress := budget.progress(trainer.step)) < 1.0:
        current, views = stage, upcoming.result()
        stage = schedule.stage(progress)
        upcoming = sampler.prefetch(stage.num_photos, stage.side)
        losses = trainer.update(
            views,
            visible_fraction=current.visible_fraction,
            learning_rate=schedule.learning_rate(progress),
        )
        sums += torch.stack(losses[:5]).detach()
        count += 1
        if count == LOG_STEPS:
            means = dict(zip(LOSS_NAMES, (sums / count).tolist(), strict=True))
            logger.info(
                "step %d, %.1f %%, %d px, %s, pairs %d, %.0f views/s",
                trainer.step,
                100 * progress,
                current.side,
                ", ".join(f"{name} {value:.3f}" for name, value in means.items()),
                losses.num_pairs,
                trainer.views_seen / budget.seconds,
            )
            sums.zero_()
            count = 0
        if budget.seconds - saved_at > CHECKPOINT_SECONDS:
            trainer.save(checkpoint, spent_seconds=budget.seconds)
            saved_at = budget.seconds
    trainer.save(checkpoint, spent_seconds=budget.seconds)
    return means


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of photographs, recursive"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="train for this long, on any machine")
    budget.add_argument("--steps", type=int, help="train for this many steps, repeatably")
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument(
        "--weights",
        type=float,
        nargs=4,
        default=LossWeights(),
        metavar=("MASKED", "SCENE", "PLACE", "SPREAD"),
        help="weights of the losses, default %(default)s",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="folder of an earlier run to start from, with larger views; the losses' heads too, "
        "where its checkpoint.pt is there",
    )
    parser.add_argument(
        "--border-share",
        type=float,
        default=0.0,
        help="share of views with noise around them, as a register border (default 0)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT/checkpoint.pt")
    return parser.parse_args()


def _start_record(start: Path | None) -> dict[str, object] | None:
    """What the run that this one started from says of itself."""
    if start is None:
        return None
    record: dict[str, object] = json.loads((start / "pretrain.json").read_text())
    return record


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "checkpoint.pt"

    photos = load_photos(arguments.images, short_side=SHORT_SIDE, threads=arguments.threads)
    logger.info("decoded %d photographs", len(photos))
    trainer = Trainer(arguments)
    spent_seconds = trainer.load(checkpoint) if arguments.resume else 0.0
    # The first views after a resume are new ones, not a repetition of the first epoch.
    sampler_generator = torch.Generator().manual_seed(arguments.seed + trainer.step)
    sampler = ViewSampler(photos, sampler_generator, threads=1)
    budget = Budget(minutes=arguments.minutes, steps=arguments.steps, spent_seconds=spent_seconds)
    schedule = (
        Schedule(STAGES, arguments.rate or LEARNING_RATE)
        if arguments.start is None
        else Schedule(LATER_STAGES, arguments.rate or LATER_LEARNING_RATE)
    )
    losses = train(trainer, sampler, budget, schedule, checkpoint)

    record = {
        "seed": arguments.seed,
        "start": _start_record(arguments.start),
        "rate": schedule.peak,
        "border_share": arguments.border_share,
        "num_photos": len(photos),
        "steps": trainer.step,
        "views_seen": trainer.views_seen,
        "minutes": round(budget.seconds / 60.0, 2),
        "loss_weights": list(arguments.weights),
        "final_losses": losses,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    save_timm_folder(
        trainer.encoder, arguments.output, architecture=ARCHITECTURE, mean=PIXEL_MEAN, std=PIXEL_STD
    )
    (arguments.output / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
