"""AdamW over the adapter, and the course of its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from trainer.config import OptimSection


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], section: OptimSection, *, global_batch: int
) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two dimensions and more.

    Args:
        parameters: Named; those that are frozen are left out.
        section: Settings.
        global_batch: Images per optimiser step; the learning rate scales with it.
    """
    base_lr = section.lr * global_batch / section.reference_batch
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decay = section.weight_decay if parameter.ndim >= 2 else 0.0
        lr = base_lr * (section.lora_plus_ratio if "lora_B" in name else 1.0)
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), members in groups.items()
        ],
        lr=base_lr,
        betas=section.betas,
        eps=section.eps,
    )


def lr_factor(step: int, num_steps: int, section: OptimSection) -> float:
    """The learning rate of a step (from 0) over its full value: a pure function of the step."""
    warmup_steps = round(section.warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if section.schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return section.final_lr + (1 - section.final_lr) * (1 + math.cos(math.pi * done)) / 2


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's own learning rate; returns that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
