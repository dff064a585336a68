"""docs/runbook.md: a section for each alert, and nothing in it that does not exist."""

import re

import yaml

from k8s.components.monitoring.generator.__main__ import RULE_FILES
from tests.deploy.promql import registered
from tests.support import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
_BASE = "https://vit-refinery.example/docs/runbook.md#"


def alerts_of(name):
    groups = yaml.safe_load((MONITORING / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


ALERTS = [alert for name in RULE_FILES for alert in alerts_of(name)]


def anchors(document):
    """Of its headings; a heading of one word is its own anchor, in lower case."""
    return re.findall(r"^### (\w+)$", document, re.MULTILINE)


def unexplained(alerts, runbook):
    """What is missing for somebody who is woken by one of the alerts."""
    headings = anchors(runbook)
    for alert in alerts:
        name, notes = alert["alert"], alert["annotations"]
        if alert["labels"]["severity"] not in ("page", "ticket"):
            yield f"{name}: severity"
        if notes.keys() != {"summary", "description", "runbook_url"} or not all(notes.values()):
            yield f"{name}: annotations"
        if notes.get("runbook_url") != _BASE + name.lower() or name not in headings:
            yield f"{name}: runbook"
    names = {alert["alert"] for alert in alerts}
    yield from (f"{heading}: no such alert" for heading in headings if heading not in names)


def test_every_alert_has_a_section_of_the_runbook_and_every_section_an_alert():
    assert list(unexplained(ALERTS, RUNBOOK)) == []


def test_an_alert_that_nothing_explains_is_noticed():
    annotations = {"summary": "a", "description": "", "runbook_url": _BASE + "other"}
    alert = {"alert": "Refinery", "labels": {"severity": "high"}, "annotations": annotations}

    assert list(unexplained([alert], "### Other\n")) == [
        "Refinery: severity",
        "Refinery: annotations",
        "Refinery: runbook",
        "Other: no such alert",
    ]


def incomplete(runbook):
    """Headings of sections that do not answer the four questions, in order."""
    for section in re.split(r"^### ", runbook, flags=re.MULTILINE)[1:]:
        leads = re.findall(r"^\*\*(.*?)\*\*", section, re.MULTILINE)
        if leads != ["Meaning.", "Look at.", "Do.", "Escalate."]:
            yield section.splitlines()[0]


def test_every_section_says_what_it_means_what_to_look_at_what_to_do_and_when_to_escalate():
    assert list(incomplete(RUNBOOK)) == []
    assert list(incomplete(RUNBOOK.replace("**Do.**", "Do.", 1))) == [anchors(RUNBOOK)[0]]


def misnamed(runbook, known):
    """Panels, metrics and log lines that the runbook speaks of and that are none."""
    flat = " ".join(runbook.split())
    dashboard = (MONITORING / "dashboards" / "vit-refinery.json").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    sources = re.sub(r'"\s+"', "", sources)  # texts in two pieces
    for panel in re.findall(r"panel \*(.+?)\*", flat):
        if f'"title": "{panel}"' not in dashboard:
            yield panel
    for metric in re.findall(r"\brefinery_\w+", flat):
        if not {metric, f"{metric}_bucket"} & known.keys():
            yield metric
    for line in re.findall(r"log line `(.+?)`", flat):
        if not all(piece.strip() in sources for piece in line.split("...")):
            yield line


def test_the_runbook_names_only_panels_metrics_and_log_lines_that_exist():
    known = registered()
    assert RUNBOOK.count("panel *") > len(ALERTS)
    assert RUNBOOK.count("log line `") > 5
    assert list(misnamed(RUNBOOK, known)) == []

    invented = "the panel *Weather*, refinery_weather and the log line `the weather of ... is bad`"

    assert list(misnamed(invented, known)) == [
        "Weather",
        "refinery_weather",
        "the weather of ... is bad",
    ]
