"""Filling a model from a checkpoint, file by file, in the target's precision.

The model is built on the meta device, where it costs nothing. Every tensor is read, converted, cast
and put in its place before the next: host memory at the peak is the weights, in the target's
precision, and one file of the checkpoint.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backbone.checkpoints.files import Checkpoint
from backbone.checkpoints.layouts import EVA_ORIGINAL, TIMM
from backbone.checkpoints.planning import Plan, check_plan, plan_loading
from backbone.checkpoints.rules import Layout, Rule
from backbone.errors import ModelError

logger = logging.getLogger(__name__)


def find_plan(
    vit: nn.Module,
    checkpoint: Checkpoint,
    *,
    model: str,
    dropped_blocks: int = 0,
    timm_converts: bool = False,
) -> Plan | None:
    """How to fill a model; None if that is better left to timm's converters.

    Args:
        vit: The model, on any device.
        model: What errors call it.
        dropped_blocks: See `plan_loading`.
        timm_converts: Whether timm may know a layout of this checkpoint that is not known here.

    Raises:
        ModelError: the checkpoint does not fit: names the file, the key and its shape.
    """
    targets = vit.state_dict()
    plan = plan_loading(checkpoint.keys, targets, dropped_blocks=dropped_blocks)
    is_clear = plan.layout not in (TIMM, EVA_ORIGINAL) and 2 * plan.num_given > len(targets)
    if plan.num_problems and timm_converts and not is_clear:
        return None
    check_plan(plan, checkpoint, targets, model)
    return plan


def fill(
    vit: nn.Module, checkpoint: Checkpoint, plan: Plan, *, model: str, dtype: torch.dtype
) -> None:
    """Give a model that was built on the meta device the tensors of a checkpoint.

    Raises:
        ModelError: a file is missing, damaged or truncated, or a shape is another.
    """
    targets = vit.state_dict()
    sources = {key: rule for rule in plan.rules for key in rule.published}
    state: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        here = {key for key in shard.keys if key in sources or key in plan.zero}
        if not here:
            continue  # the text tower's
        with shard.open() as tensors:
            for rule in dict.fromkeys(sources[key] for key in shard.keys if key in sources):
                parts = {k: tensors[k] if k in here else waiting.get(k) for k in rule.published}
                if any(part is None for part in parts.values()):
                    # The rest is in another file, and this one is about to be let go.
                    waiting |= {k: parts[k].clone() for k in rule.published if k in here}  # type: ignore[union-attr]
                    continue
                for key in rule.published:
                    waiting.pop(key, None)
                values = [part for part in parts.values() if part is not None]
                _convert(rule, values, targets, state, dtype, f"{shard.path}", model)
            for key in plan.zero:
                if key in here and tensors[key].any():
                    raise ModelError(
                        f"{shard.path}: {key} is not zero, and {model} has no place for it; "
                        "take the model of that name with biases (timm's have qkvb in the name)"
                    )
    _put(vit, state)
    logger.info("read %d tensors of %s (%s layout)", len(state), checkpoint.name, plan.layout.name)


def assign(vit: nn.Module, state: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device tensors of its own names, cast to `dtype`.

    Raises:
        RuntimeError: names or shapes differ, as `load_state_dict` says it.
    """
    _put(vit, {name: _copied(value, dtype) for name, value in state.items()})


def to_published(
    state: Mapping[str, Tensor], layout: Layout, *, depth: int, prefix: str = ""
) -> dict[str, Tensor]:
    """A model's tensors in a published layout: the way back of `fill`."""
    published: dict[str, Tensor] = {}
    for rule in layout.expanded(depth, prefix):
        if all(name in state for name in rule.ours):
            parts = rule.write([state[name] for name in rule.ours])
            published |= zip(rule.published, (part.contiguous() for part in parts), strict=True)
    return published


def _convert(
    rule: Rule,
    parts: list[Tensor],
    targets: Mapping[str, Tensor],
    state: dict[str, Tensor],
    dtype: torch.dtype,
    path: str,
    model: str,
) -> None:
    got = ", ".join(
        f"{key} {list(part.shape)}" for key, part in zip(rule.published, parts, strict=True)
    )
    try:
        values = rule.read(parts)
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"{path}: {got} cannot become {', '.join(rule.ours)}: {error}") from error
    for name, value in zip(rule.ours, values, strict=True):
        wanted = targets[name]
        if value.shape != wanted.shape:
            raise ModelError(
                f"{path}: {got} is {name} {list(value.shape)}, and {model} has "
                f"{list(wanted.shape)}; it is of another model"
            )
        if value.is_floating_point() != wanted.is_floating_point():
            raise ModelError(
                f"{path}: {got} is {name} in {value.dtype}, and {model} has {wanted.dtype}; "
                "quantised weights are not read: take those in floating point"
            )
        state[name] = _copied(value, dtype)


def _copied(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own: what is left of a file's mapping would keep all of it."""
    return value.to(
        dtype if value.is_floating_point() else value.dtype,
        copy=True,
        memory_format=torch.contiguous_format,
    )


def _put(vit: nn.Module, state: Mapping[str, Tensor]) -> None:
    vit.load_state_dict(state, strict=True, assign=True)
    _materialise_buffers(vit)


def _materialise_buffers(vit: nn.Module) -> None:
    """Give the buffers that no checkpoint has, such as rotary frequencies, their values."""
    for path, module in vit.named_modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        initialise = getattr(module, "init_non_persistent_buffers", None)
        if lost and initialise is None:
            raise ModelError(
                f"{path}.{lost[0]} ({type(module).__name__}) is in no checkpoint, and this version "
                "of timm cannot compute it for a loaded model; use a newer one"
            )
        for name in lost:
            empty = torch.empty_like(getattr(module, name), device="cpu")
            module.register_buffer(name, empty, persistent=False)
        if initialise is not None:
            initialise()
