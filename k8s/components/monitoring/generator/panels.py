"""Panels of a Grafana dashboard, as the JSON that Grafana stores; only long-lived fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Panel = dict[str, Any]
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series."""

    expression: str
    legend: str


def stat(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    steps: Sequence[tuple[float | None, str]] = ((None, "text"),),
    decimals: int | None = None,
    width: int = 4,
) -> Panel:
    """The latest value, coloured by `steps` of (from, colour); the first begins at None."""
    defaults: dict[str, Any] = {
        "unit": unit,
        "color": {"mode": "thresholds"},
        "thresholds": _thresholds(steps),
        "noValue": "none",
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    panel = _panel("stat", title, description, width, 4, queries, defaults)
    panel["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "value" if len(queries) == 1 else "value_and_name",
    }
    return panel


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    colours: Mapping[str, str] | None = None,
    limits: Sequence[tuple[float, str]] = (),
    most: float | None = None,
    stacked: bool = False,
    width: int = 8,
) -> Panel:
    """Lines over time, from zero.

    Args:
        colours: Of series, by regular expressions of their names.
        limits: Lines across, (at, colour).
        most: End of the axis, where values have one.
        stacked: Areas on top of each other, for parts of a whole.
    """
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 5,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if limits else "off"},
    }
    defaults: dict[str, Any] = {
        "unit": unit,
        "min": 0,
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "thresholds": _thresholds([(None, "transparent"), *limits]),
    }
    if most is not None:
        defaults["max"] = most
    panel = _panel("timeseries", title, description, width, 8, queries, defaults)
    panel["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byRegexp", "options": pattern},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for pattern, colour in (colours or {}).items()
    ]
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def heatmap(title: str, description: str, expression: str, *, unit: str, width: int = 8) -> Panel:
    """How many observations fell into each bucket; `expression` sums increases by `le`."""
    panel = _panel("heatmap", title, description, width, 8, [Query(expression, "{{le}}")], {})
    panel["targets"][0]["format"] = "heatmap"
    panel["options"] = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": "short"},
        "color": {
            "mode": "scheme",
            "scheme": "Blues",
            "exponent": 0.5,
            "fill": "blue",
            "steps": 64,
            "reverse": False,
            "scale": "exponential",
        },
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    return panel


def table(title: str, description: str, expression: str, *, width: int = 12) -> Panel:
    """Labels of series as rows; their value, always 1 for what is shown so, is left out."""
    panel = _panel("table", title, description, width, 8, [Query(expression, "")], {})
    target = panel["targets"][0]
    target |= {"format": "table", "instant": True, "range": False}
    del target["legendFormat"]
    panel["options"] = {"showHeader": True, "cellHeight": "sm"}
    panel["transformations"] = [
        {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
    ]
    return panel


def dashboard(
    *,
    uid: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    variables: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The whole of it; panels of a row flow from left to right, and begin anew where it is full."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["vit-refinery"],
        # Grafana brings older schemas up to date and does not know newer ones: that of 11.0.
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": list(variables)},
        "panels": _place(rows),
    }


def datasource_variable() -> dict[str, Any]:
    """Which Prometheus is asked."""
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
    }


def label_variable(name: str, label: str, selector: str) -> dict[str, Any]:
    """Values of the label `name`; "All" also matches series without it."""
    query = f"label_values({selector}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "options": [],
        "refresh": 2,
        "regex": "",
        "sort": 1,
    }


def _panel(
    kind: str,
    title: str,
    description: str,
    width: int,
    height: int,
    queries: Sequence[Query],
    defaults: dict[str, Any],
) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "editorMode": "code",
                "expr": query.expression,
                "legendFormat": query.legend,
                "instant": False,
                "range": True,
            }
            for index, query in enumerate(queries)
        ],
    }


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> dict[str, Any]:
    return {
        "mode": "absolute",
        "steps": [{"color": colour, "value": value} for value, colour in steps],
    }


def _place(rows: Sequence[tuple[str, Sequence[Panel]]]) -> list[Panel]:
    placed: list[Panel] = []
    y = 0
    for title, panels in rows:
        placed.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = height = 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > _COLUMNS:
                x, y, height = 0, y + height, 0
            placed.append(panel | {"gridPos": size | {"x": x, "y": y}})
            x += size["w"]
            height = max(height, size["h"])
        y += height
    return [{"id": number} | panel for number, panel in enumerate(placed, 1)]
