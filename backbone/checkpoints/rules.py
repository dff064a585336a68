"""How a published key layout relates to ours: rules that run in both directions.

A `Rule` says that some tensors of a file are, together, some tensors of the model. `{i}` in a name
stands for the number of a block. Names of the model are timm's.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tensors = list[Tensor]
Change = Callable[[Tensors], Tensors]


def _as_it_is(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Published tensors, the model's tensors, and what is done to get the ones from the others."""

    published: tuple[str, ...]
    ours: tuple[str, ...]
    read: Change = _as_it_is
    write: Change = _as_it_is

    def of_block(self, number: int) -> "Rule":
        def fill(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.replace("{i}", str(number)) for name in names)

        return replace(self, published=fill(self.published), ours=fill(self.ours))

    def prefixed(self, prefix: str) -> "Rule":
        return replace(self, published=tuple(prefix + name for name in self.published))


@dataclass(frozen=True)
class Layout:
    """Key names of one kind of publication.

    Attributes:
        name: What logs, records and errors call it.
        rules: Those whose tensors the model lacks do not apply to it.
        prefixes: What may stand before all of its keys.
        skipped: Patterns of keys that are other parts than the dense features need: text towers,
            projections, pooling heads that the model has no place for. Whatever matches none is
            an error.
        zero: Patterns of keys that the model may lack when their values are all zero.
    """

    name: str
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("",)
    skipped: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()

    def expanded(self, depth: int, prefix: str) -> Iterator[Rule]:
        """The rules with block numbers and the prefix filled in."""
        for rule in self.rules:
            if "{i}" in rule.ours[0]:
                for number in range(depth):
                    yield rule.of_block(number).prefixed(prefix)
            else:
                yield rule.prefixed(prefix)

    def skips(self, key: str, prefix: str) -> bool:
        return _matches(self.skipped, key, prefix)

    def may_drop_if_zero(self, key: str, prefix: str) -> bool:
        return _matches(self.zero, key, prefix)

    def block_number(self, key: str, prefix: str) -> int | None:
        """The number of the block that a key belongs to."""
        for stem in {r.published[0].split("{i}")[0] for r in self.rules if "{i}" in r.published[0]}:
            if found := re.match(re.escape(prefix + stem) + r"(\d+)\.", key):
                return int(found[1])
        return None


def _matches(patterns: Iterable[str], key: str, prefix: str) -> bool:
    candidates = (key, key.removeprefix(prefix))
    return any(re.match(pattern, text) for pattern in patterns for text in candidates)


def same(published: str, ours: str, kinds: str = "weight bias") -> Iterator[Rule]:
    """Another name alone, for the weight and the bias."""
    for kind in kinds.split():
        yield Rule((f"{published}.{kind}",), (f"{ours}.{kind}",))


def tensor(published: str, ours: str) -> Rule:
    """Another name for a tensor that is not a layer's weight or bias."""
    return Rule((published,), (ours,))


def reshaped(published: str, ours: str, *, dims: int) -> Rule:
    """`dims` leading dimensions of size one that only our tensor has."""
    ones = (1,) * dims
    return Rule(
        (published,),
        (ours,),
        read=lambda t: [t[0].reshape(*ones, *t[0].shape)],
        write=lambda t: [t[0].reshape(t[0].shape[dims:])],
    )


def fused(published: str, names: tuple[str, str, str], ours: str) -> Iterator[Rule]:
    """Queries, keys and values published one by one, and one layer in the model."""
    for kind in ("weight", "bias"):
        yield Rule(
            tuple(f"{published}.{name}.{kind}" for name in names),
            (f"{ours}.{kind}",),
            read=lambda t: [torch.cat(t)],
            write=lambda t: list(t[0].chunk(3)),
        )


def parted(published: str, ours: str, names: tuple[str, str, str]) -> Iterator[Rule]:
    """Queries, keys and values published as one layer, and three in the model."""
    for kind in ("weight", "bias"):
        yield Rule(
            (f"{published}.{kind}",),
            tuple(f"{ours}.{name}.{kind}" for name in names),
            read=lambda t: list(t[0].chunk(3)),
            write=lambda t: [torch.cat(t)],
        )
