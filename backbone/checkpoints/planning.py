"""Which tensor of a checkpoint becomes which of a model: found before any is read."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from backbone.checkpoints.files import Checkpoint
from backbone.checkpoints.layouts import LAYOUTS, TIMM
from backbone.checkpoints.rules import Layout, Rule
from backbone.errors import ModelError


@dataclass(frozen=True)
class Plan:
    """The rules that turn a checkpoint into a model, and what does not work out.

    Attributes:
        missing: Keys that rules need and the checkpoint lacks.
        uncovered: Tensors of the model that no rule gives.
        unexpected: Keys that no rule takes and that are not known to be other parts.
        zero: Keys that may be left out if their values are all zero.
    """

    layout: Layout
    prefix: str
    rules: tuple[Rule, ...]
    missing: tuple[str, ...]
    uncovered: tuple[str, ...]
    unexpected: tuple[str, ...]
    zero: tuple[str, ...]

    @property
    def num_problems(self) -> int:
        return len(self.missing) + len(self.uncovered) + len(self.unexpected)

    @property
    def num_given(self) -> int:
        """Tensors of the model that the checkpoint has all parts of."""
        missing = set(self.missing)
        return sum(len(r.ours) for r in self.rules if missing.isdisjoint(r.published))


def plan_loading(
    keys: Collection[str], targets: Collection[str], *, dropped_blocks: int = 0
) -> Plan:
    """The plan of the layout that fits best; its `num_problems` says how well.

    Args:
        keys: Of the checkpoint.
        targets: Names of the model's parameters and persistent buffers.
        dropped_blocks: Blocks of the checkpoint that follow the model's last and are left out.
    """
    plans = [
        _plan(layout, prefix, set(keys), set(targets), dropped_blocks)
        for layout in LAYOUTS
        for prefix in layout.prefixes
        if any(key.startswith(prefix) for key in keys)
    ]
    return min(plans, key=lambda plan: (plan.num_problems > 0, -plan.num_given, plan.num_problems))


def check_plan(
    plan: Plan, checkpoint: Checkpoint, targets: Mapping[str, Tensor], model: str
) -> None:
    """Raise a ModelError that names file, key and shape unless the plan is complete."""
    if not plan.num_problems:
        return
    of_layout = f"as {plan.layout.name} layout for {model}"
    needed_for = {key: rule.ours[0] for rule in plan.rules for key in rule.published}
    if plan.missing:
        key = plan.missing[0]
        ours = needed_for.get(key)
        shape = f", needed for {ours} of {list(targets[ours].shape)}" if ours else ""
        raise ModelError(
            f"{checkpoint.name}, read {of_layout}, lacks {len(plan.missing)} keys, the first "
            f"{key}{shape}; it is incomplete, or of another model"
        )
    if plan.uncovered:
        name = plan.uncovered[0]
        raise ModelError(
            f"{checkpoint.name}, read {of_layout}, gives nothing for {len(plan.uncovered)} of its "
            f"tensors, the first {name} of {list(targets[name].shape)}; it is of another model"
        )
    key = plan.unexpected[0]
    path = checkpoint.file_of(key)
    with next(s for s in checkpoint.shards if s.path == path).open() as tensors:
        shape = f"of {list(tensors[key].shape)}"
    raise ModelError(
        f"{path}, read {of_layout}, has {len(plan.unexpected)} keys that the model has no place "
        f"for, the first {key} {shape}; it is of another model"
    )


def model_depth(targets: Collection[str]) -> int:
    """Blocks of a model, by its tensors' names."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in targets)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _plan(
    layout: Layout, prefix: str, keys: set[str], targets: set[str], dropped_blocks: int
) -> Plan:
    rules = tuple(_applicable(layout, prefix, targets))
    wanted = {key for rule in rules for key in rule.published}
    given = {name for rule in rules for name in rule.ours}
    dropped, absent = _dropped(layout, prefix, keys, model_depth(targets), dropped_blocks)
    left = keys - wanted - dropped
    zero = {key for key in left if layout.may_drop_if_zero(key, prefix)}
    unexpected = {key for key in left - zero if not layout.skips(key, prefix)}
    return Plan(
        layout,
        prefix,
        rules,
        missing=(*sorted(wanted - keys), *absent),
        uncovered=tuple(sorted(targets - given)),
        unexpected=tuple(sorted(unexpected)),
        zero=tuple(sorted(zero)),
    )


def _applicable(layout: Layout, prefix: str, targets: set[str]) -> Iterator[Rule]:
    if layout is TIMM:
        yield from (Rule((name,), (name,)) for name in sorted(targets))
        return
    for rule in layout.expanded(model_depth(targets), prefix):
        if targets.issuperset(rule.ours):
            yield rule


def _dropped(
    layout: Layout, prefix: str, keys: set[str], depth: int, count: int
) -> tuple[set[str], tuple[str, ...]]:
    """Keys of the blocks to leave out, and a name for every such block that is not there.

    A checkpoint that lacks them was cut before: its last blocks would be cut a second time.
    """
    if not count:
        return set(), ()
    numbers = {key: layout.block_number(key, prefix) for key in keys}
    blocks = range(depth, depth + count)
    dropped = {key for key, number in numbers.items() if number in blocks}
    absent = sorted(set(blocks) - set(numbers.values()))
    return dropped, tuple(f"block {number} (to be left out)" for number in absent)
