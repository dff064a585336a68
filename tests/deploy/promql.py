"""What an expression of PromQL refers to, and whether the service has that.

promtool says whether an expression parses. It does not know which metrics there are, with which
labels, nor that a counter says nothing without `rate`: that is checked here, on tokens.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from prometheus_client.metrics import MetricWrapperBase

from service.cache import build_cache
from service.cache.metrics import DropReason, ErrorKind, Result, Tier
from service.metrics import STAGES, Metrics
from service.settings import Settings

Kind = Literal["gauge", "counter", "bucket"]
# What Prometheus and its operator add to every series of a target.
TARGET_LABELS = frozenset({"job", "instance", "namespace"})
_OF_COUNTERS = frozenset({"rate", "increase"})
_TOKEN = re.compile(r'"[^"]*"|[a-zA-Z_:][\w:]*|\d[\w.]*|[=!<>]=|[=!]~|\S')
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_LISTS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_AGGREGATIONS = frozenset({"sum", "count", "min", "max", "avg"})
_WORDS = frozenset({"and", "or", "unless", "offset", "bool"})


@dataclass(frozen=True)
class Known:
    """A series that expressions may refer to."""

    kind: Kind
    labels: frozenset[str]
    edges: frozenset[float] = frozenset()
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)


class Use(NamedTuple):
    """A metric in an expression and what is around it."""

    name: str
    matchers: dict[str, tuple[str, str]]  # label: (operator, value)
    has_range: bool
    functions: tuple[str, ...]  # that it is in, from outside
    kept: tuple[frozenset[str] | None, ...]  # labels that each of its aggregations keeps by name


def registered() -> dict[str, Known]:
    """Every series of the service's own registry, by the name that it has in Prometheus."""
    metrics = Metrics()
    build_cache(Settings(model=("m",)), metrics.registry)
    known = {}
    values = {
        "stage": frozenset(STAGES),
        "tier": frozenset(get_args(Tier)),
        "result": frozenset(get_args(Result)),
        "kind": frozenset(get_args(ErrorKind)),
        "reason": frozenset(get_args(DropReason)),
        "state": frozenset({"free", "used"}),
    }
    for family in metrics.registry.collect():
        # The process collector has no labels. Others tell theirs to nobody but themselves.
        collector = metrics.registry._names_to_collectors.get(family.name)
        labels, edges = TARGET_LABELS, frozenset()
        if isinstance(collector, MetricWrapperBase):
            labels |= frozenset(collector._labelnames)
        named = {label: values[label] for label in labels & values.keys()}
        if family.type == "counter":
            known[f"{family.name}_total"] = Known("counter", labels, edges, named)
        elif family.type == "histogram":
            edges = frozenset(collector._kwargs["buckets"]) | {float("inf")}
            known[f"{family.name}_bucket"] = Known("bucket", labels | {"le"}, edges, named)
            for suffix in ("sum", "count"):
                known[f"{family.name}_{suffix}"] = Known("counter", labels, frozenset(), named)
        else:
            known[family.name] = Known("gauge", labels, edges, named)
    return known


def problems(expression: str, known: Mapping[str, Known]) -> list[str]:
    """What is wrong with an expression that parses; nothing, if nothing is."""
    found = []
    for use in uses(expression):
        metric = known.get(use.name)
        if metric is None:
            found.append(f"{use.name} does not exist")
            continue
        found += [
            f"{use.name} has no label {label}" for label in use.matchers.keys() - metric.labels
        ]
        found += _wrong_values(use, metric)
        function = use.functions[-1] if use.functions else ""
        if metric.kind == "gauge" and function in _OF_COUNTERS:
            found.append(f"{use.name} is a gauge: {function} says nothing of it")
        if metric.kind != "gauge" and not (use.has_range and function in _OF_COUNTERS):
            found.append(f"{use.name} counts since the process began: use rate or increase")
        kept = [labels for labels in use.kept if labels is not None]
        if metric.kind == "bucket" and "le" not in use.matchers:
            if "histogram_quantile" in use.functions or kept:
                found += [f"{use.name} is summed over le" for by in kept if "le" not in by]
        elif "histogram_quantile" in use.functions:
            found.append(f"{use.name} is no bucket: histogram_quantile needs them")
        found += [
            f"{use.name} has no label {label}, by which it is summed"
            for by in kept
            for label in by - metric.labels
        ]
    return found


def _wrong_values(use: Use, metric: Known) -> Iterator[str]:
    for label, (operator, value) in use.matchers.items():
        if label == "le":
            if operator != "=" or float(value) not in metric.edges:
                yield f"{use.name} has no bucket that ends at {value}"
        elif label in metric.values:
            for part in value.split("|"):
                if part not in metric.values[label]:
                    yield f"{label} of {use.name} is never {part}"


def uses(expression: str) -> list[Use]:
    """The metrics of an expression, in order."""
    tokens = _TOKEN.findall(expression)
    found: list[Use] = []
    around: list[tuple[str, frozenset[str] | None]] = []  # of each open parenthesis
    function, by = "", None
    index = 0
    while index < len(tokens):
        token = tokens[index]
        following = tokens[index + 1] if index + 1 < len(tokens) else ""
        if token in _LISTS:
            end = tokens.index(")", index)
            if token == "by":
                by = frozenset(tokens[index + 2 : end : 2])
            elif token == "without":
                by = None
            index = end
        elif token == "(":
            around.append((function, by))
            function, by = "", None
        elif token == ")":
            around.pop()
        elif token == "[":
            index = tokens.index("]", index)
        elif token in _AGGREGATIONS:
            function, by = token, frozenset()
        elif token in _WORDS:
            function = ""
        elif _NAME.fullmatch(token) and following == "(":
            function = token
        elif _NAME.fullmatch(token):
            matchers: dict[str, tuple[str, str]] = {}
            if following == "{":
                end = tokens.index("}", index)
                inside = tokens[index + 2 : end]
                for at in range(0, len(inside), 4):
                    label, operator, value = inside[at : at + 3]
                    matchers[label] = operator, value.strip('"')
                index = end
            has_range = tokens[index + 1 : index + 2] == ["["]
            names = tuple(name for name, _ in around if name)
            found.append(Use(token, matchers, has_range, names, tuple(kept for _, kept in around)))
        index += 1
    assert not around, f"parentheses of {expression!r}"
    return found
