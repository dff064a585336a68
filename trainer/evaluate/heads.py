"""One linear layer per learning rate, trained at once on the same batches.

Dimension key: P = points, C = channels, R = learning rates, K = outputs of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainer.evaluate.points import (
    Normalization,
    NormalizationKind,
    PointBatches,
    Points,
    ProbeError,
)
from trainer.evaluate.progress import Advance

logger = logging.getLogger(__name__)

# Of all steps: DINOv2's segmentation warms up for 1,500 of 40,000 iterations.
WARMUP_SHARE = 1500 / 40_000
INITIAL_STD = 0.01

# Outputs [P, R, K] and targets [P] to the loss: a sum over heads of each head's mean.
Loss = Callable[[Tensor, Tensor], Tensor]


class HeadSettings(Protocol):
    """What the settings of every probe say of its heads."""

    @property
    def learning_rates(self) -> tuple[float, ...]: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def points_per_image(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def normalization(self) -> NormalizationKind: ...


class Heads:
    """Linear layers of one shape, side by side in one matrix product."""

    def __init__(
        self,
        num_heads: int,
        num_channels: int,
        num_outputs: int,
        *,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        # One draw for all: heads differ by their learning rate alone.
        weight_CK = INITIAL_STD * torch.randn(num_channels, num_outputs, generator=generator)
        self.weights = [weight_CK.to(device, copy=True).requires_grad_() for _ in range(num_heads)]
        self.biases = [
            torch.zeros(num_outputs, device=device, requires_grad=True) for _ in range(num_heads)
        ]

    def __call__(self, features_PC: Tensor, *, only: int | None = None) -> Tensor:
        """Outputs `[P, R, K]`, of all heads or of one (R = 1)."""
        chosen = slice(None) if only is None else slice(only, only + 1)
        outputs = torch.addmm(
            torch.cat(self.biases[chosen]), features_PC, torch.cat(self.weights[chosen], dim=1)
        )
        return outputs.view(len(features_PC), -1, len(self.biases[0]))


def train_heads(
    heads: Heads,
    batches: PointBatches,
    normalize: Callable[[Tensor], Tensor],
    loss: Loss,
    *,
    learning_rates: Sequence[float],
    num_steps: int,
    weight_decay: float,
    advance: Advance | None = None,
) -> None:
    """AdamW with a linear warm-up and a linear decay to zero, as of DINOv2's segmentation.

    Raises:
        ProbeError: A loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight, bias], "lr": learning_rate}
            for weight, bias, learning_rate in zip(
                heads.weights, heads.biases, learning_rates, strict=True
            )
        ],
        weight_decay=weight_decay,
        foreach=True,
    )
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / num_steps)
    )
    for step in range(num_steps):
        features_PC, target_P = batches.draw()
        value = loss(heads(normalize(features_PC)), target_P)
        if not torch.isfinite(value):
            raise ProbeError(
                f"the probe's loss is {value.item()} in step {step} of {num_steps}; leave out the "
                f"largest of --learning-rates, {max(learning_rates):g}"
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        optimizer.step()
        schedule.step()
        if advance is not None:
            advance(1)


def fit_heads(
    grids: Sequence[Tensor],
    points: Sequence[Points],
    num_outputs: int,
    loss: Loss,
    settings: HeadSettings,
    *,
    generator: torch.Generator,
    device: torch.device,
    advance: Advance | None = None,
) -> tuple[Normalization, Heads]:
    """A normalisation of the training part's features, and heads trained at its points.

    Raises:
        ProbeError: See `train_heads`.
    """
    normalize = Normalization.fit(grids, settings.normalization).to(device)
    heads = Heads(
        len(settings.learning_rates),
        grids[0].shape[-1],
        num_outputs,
        generator=generator,
        device=device,
    )
    batches = PointBatches(
        grids,
        points,
        batch_size=settings.batch_size,
        points_per_image=settings.points_per_image,
        generator=generator,
        device=device,
    )
    train_heads(
        heads,
        batches,
        normalize,
        loss,
        learning_rates=settings.learning_rates,
        num_steps=settings.num_steps,
        weight_decay=settings.weight_decay,
        advance=advance,
    )
    return normalize, heads


def warn_of_edge(what: str, best: float, learning_rates: Sequence[float]) -> bool:
    """Whether the best learning rate is the smallest or largest tried; says so in the log."""
    is_at_edge = len(learning_rates) > 1 and best in (min(learning_rates), max(learning_rates))
    if is_at_edge:
        logger.warning(
            "%s: the best learning rate, %g, is at the edge of the grid %s: a wider grid or more "
            "steps may score higher",
            what,
            best,
            ", ".join(f"{rate:g}" for rate in sorted(learning_rates)),
        )
    return is_at_edge
