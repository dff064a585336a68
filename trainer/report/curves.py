"""Curves of a training run: loss terms, what the filters keep, learning rate."""

from collections.abc import Mapping, Sequence
from html import escape

from trainer.report.charts import Line, lines

_TERMS = {
    "refinement": "refinement",
    "register_uniformity": "register uniformity",
    "absorption": "absorption",
    "consistency": "consistency",
}
_CLEAN = {
    "clean": "all filters",
    "clean_fixed_pattern": "fixed pattern",
    "clean_global_proxy": "global proxy",
    "clean_register_guided": "register-guided",
    "clean_attention_hijack": "attention hijack",
}


def curves(records: Sequence[Mapping[str, float]]) -> str:
    """The charts that the records have values for; nothing without records."""
    if not records:
        return ""
    found = [
        _chart(records, "Loss", {"loss": "loss"}),
        _chart(records, "Terms of the loss", _TERMS),
        _chart(records, "Tokens that the filters keep, %", _CLEAN, factor=100),
        _chart(records, "Learning rate", {"lr": "learning rate"}, is_exact=True),
    ]
    note = (
        f'<p class="note">{len(records)} steps. Pale lines are as recorded, strong ones a running '
        "mean over a twentieth of the steps.</p>"
    )
    return f'<div class="charts">{"".join(found)}</div>{note}'


def _chart(
    records: Sequence[Mapping[str, float]],
    title: str,
    names: Mapping[str, str],
    *,
    factor: float = 1,
    is_exact: bool = False,
) -> str:
    series = []
    for key, name in names.items():
        points = [
            (record["step"], factor * value)
            for record in records
            if isinstance(value := record.get(key), int | float)
        ]
        if points:
            steps, values = zip(*points, strict=True)
            series.append(Line(name, steps, values))
    if not series:
        return ""
    picture = lines(series, label=title, is_exact=is_exact)
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"
