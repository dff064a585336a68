"""Watches what the filters leave, and says when one of them does nothing or takes everything."""

import logging
from collections import deque
from collections.abc import Mapping

logger = logging.getLogger(__name__)

WINDOW = 20
"""Steps over which shares are averaged: a single batch says little."""
LOWEST, HIGHEST = 0.05, 0.95
"""Shares of tokens between which a filter works as it should."""

_DOCTOR = "`python -m trainer doctor` measures thresholds before a run"
_TOO_FEW = {
    "clean_fixed_pattern": "nearly all tokens resemble the reference image, as happens where a "
    "backbone's cosines are all high; raise filters.fp_gp.threshold, or set "
    "filters.fp_gp.criterion=zscore",
    "clean_global_proxy": "nearly all tokens resemble the strip beside them, as happens where a "
    "backbone's cosines are all high; raise filters.fp_gp.threshold, or set "
    "filters.fp_gp.criterion=zscore",
    "clean_register_guided": "nearly all targets resemble the student's registers; raise "
    "filters.register_guided.threshold",
    "clean_attention_hijack": "nearly all tokens get less attention than the threshold asks for; "
    "lower filters.attention_hijack.threshold, or set other filters.attention_hijack.layers",
    "clean": "what the losses learn from is a handful of tokens; see which filter takes most, and "
    "set its threshold so that it takes less",
}
_TOO_MANY = {
    "clean_fixed_pattern": "next to no token resembles the reference image; lower "
    "filters.fp_gp.threshold",
    "clean_global_proxy": "next to no token resembles the strip beside it; lower "
    "filters.fp_gp.threshold",
    "clean_register_guided": "next to no target resembles the student's registers, as is right "
    "only while they have not learned; later lower filters.register_guided.threshold",
    "clean_attention_hijack": "next to no token is short of attention in these layers; raise "
    "filters.attention_hijack.threshold, or set other filters.attention_hijack.layers",
}


class FilterWatch:
    """Warns about a filter once, and again only after it had recovered."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._warned: set[str] = set()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Take the shares (`clean_*`, `clean`) among the values of a step."""
        for name in _TOO_FEW:
            if name not in values:
                continue
            recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
            recent.append(values[name])
            if len(recent) == WINDOW:
                self._judge(name, sum(recent) / WINDOW, step)

    def _judge(self, name: str, share: float, step: int) -> None:
        if share < LOWEST:
            reason = _TOO_FEW[name]
        elif share > HIGHEST and name in _TOO_MANY:
            reason = _TOO_MANY[name]
        else:
            self._warned.discard(name)
            return
        if name in self._warned:
            return
        self._warned.add(name)
        who = "all filters together keep"
        if name != "clean":
            who = f"the filter {name.removeprefix('clean_')} keeps"
        logger.warning(
            "steps %d to %d: %s %.1f %% of the tokens: %s (%s)",
            step - WINDOW + 1,
            step,
            who,
            100 * share,
            reason,
            _DOCTOR,
        )
