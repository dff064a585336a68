"""Grafana's dashboards: their JSON is sound, and every panel asks for what the service has."""

import copy
import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from itertools import combinations

import pytest
import yaml

from tests.deploy.promql import Known, problems, registered, uses
from tests.deploy.tools import program
from tests.support import ROOT, running_server

MONITORING = ROOT / "k8s" / "components" / "monitoring"
(PATH,) = (MONITORING / "dashboards").glob("*.json")
DASHBOARD = json.loads(PATH.read_text())
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What `kubectl apply` may note of an object in one of its annotations.
_MAX_ANNOTATION_BYTES = 262_144


@pytest.fixture(scope="module")
def known():
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]
    by_job = Known("gauge", frozenset({"job", "namespace"}))
    return registered() | dict.fromkeys(names, by_job)


def targets(dashboard):
    """(panel, query) of all panels."""
    return [(panel, target) for panel in dashboard["panels"] for target in panel.get("targets", [])]


def asked(expression):
    """The expression as Prometheus gets it."""
    for name, value in (("$__rate_interval", "5m"), ("$namespace", ".*"), ("$instance", ".*")):
        expression = expression.replace(name, value)
    return expression


def structure_problems(dashboard):
    """What Grafana would show wrongly, or not show."""
    panels = dashboard["panels"]
    if not dashboard["uid"]:
        yield "no uid: every import would be another dashboard"
    ids = [panel["id"] for panel in panels]
    if len(ids) != len(set(ids)):
        yield "ids come twice"
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    if names != ["datasource", "namespace", "instance"]:
        yield "variables"
    for panel in panels:
        title, place = panel["title"], panel["gridPos"]
        if place["x"] + place["w"] > 24:
            yield f"{title}: wider than the page"
        if panel["type"] == "row":
            continue
        if not panel["description"].endswith("."):
            yield f"{title}: description"
        if panel["datasource"] != DATASOURCE:
            yield f"{title}: datasource"
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if not (unit or panel["type"] == "table" or panel["options"].get("yAxis", {}).get("unit")):
            yield f"{title}: unit"
        for target in panel["targets"]:
            if target["datasource"] != DATASOURCE:
                yield f"{title}: datasource of a query"
            if panel["type"] != "table" and not target["legendFormat"]:
                yield f"{title}: legend"
        letters = [target["refId"] for target in panel["targets"]]
        if not letters or len(letters) != len(set(letters)):
            yield f"{title}: queries"
    for one, other in combinations(panels, 2):
        if overlap(one["gridPos"], other["gridPos"]):
            yield f"{one['title']} and {other['title']}: overlap"


def overlap(one, other):
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_the_dashboard_is_sound():
    assert list(structure_problems(DASHBOARD)) == []
    assert DASHBOARD["uid"] == "vit-refinery"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda board: board.update(uid=""), "no uid"),
        (lambda board: board["templating"]["list"].pop(0), "variables"),
        (lambda board: board["panels"][1].update(id=board["panels"][2]["id"]), "ids come twice"),
        (lambda board: board["panels"][1]["gridPos"].update(x=22), "wider than the page"),
        (lambda board: board["panels"][1]["gridPos"].update(h=5), "overlap"),
        (lambda board: board["panels"][1].update(datasource={"uid": "P1809"}), "datasource"),
        (lambda board: board["panels"][1].update(description=""), "description"),
        (lambda board: board["panels"][1]["fieldConfig"]["defaults"].pop("unit"), "unit"),
        (lambda board: board["panels"][1]["targets"][0].update(legendFormat=""), "legend"),
        (lambda board: board["panels"][1]["targets"].clear(), "queries"),
    ],
)  # fmt: skip
def test_an_unsound_dashboard_is_noticed(change, problem):
    broken = copy.deepcopy(DASHBOARD)
    change(broken)

    assert any(problem in found for found in structure_problems(broken))


def parse_problems(expressions, folder):
    """What promtool says of expressions that it cannot parse."""
    rules = [
        {"record": f"expression:{number}", "expr": expression}
        for number, expression in enumerate(expressions)
    ]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": rules}]}))
    command = [program("promtool"), "check", "rules", str(folder / "rules.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def test_every_expression_parses(tmp_path):
    expressions = [asked(target["expr"]) for _, target in targets(DASHBOARD)]

    assert not any("$" in expression for expression in expressions)
    assert parse_problems(expressions, tmp_path) == ""
    assert "parse error" in parse_problems([*expressions, "sum(rate(up[5m])"], tmp_path)


def expression_problems(dashboard, known):
    for panel, target in targets(dashboard):
        title, expression = panel["title"], asked(target["expr"])
        used = uses(expression)
        yield from (f"{title}: {problem}" for problem in problems(expression, known))
        for use in used:
            wanted = {"job": ("=", "vit-refinery"), "namespace": ("=~", ".*")}
            if not use.name.startswith("job:"):  # these are of all instances
                wanted["instance"] = ("=~", ".*")
            if not wanted.items() <= use.matchers.items():
                yield f"{title}: {use.name} is not of what is chosen above"
        known_labels = frozenset().union(
            *(known[use.name].labels for use in used if use.name in known)
        )
        for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
            kept = [by for use in used for by in use.kept if by is not None]
            if label not in known_labels or any(label not in by for by in kept):
                yield f"{title}: no series has {label} for its name"


def test_every_panel_asks_for_what_the_service_has(known):
    assert list(expression_problems(DASHBOARD, known)) == []


@pytest.mark.parametrize(
    ("expression", "legend", "problem"),
    [
        ("refinery_reday", "a", "does not exist"),
        ("refinery_ready", "a", "is not of what is chosen above"),
        ("refinery_request_seconds_sum / refinery_request_seconds_count", "a", "since the process"),
        ("sum by (instance) (refinery_ready)", "{{device}}", "no series has device"),
        ("sum by (device) (refinery_engines)", "{{instance}}", "no series has instance"),
    ],
)
def test_a_panel_that_asks_for_something_else_is_noticed(known, expression, legend, problem):
    broken = copy.deepcopy(DASHBOARD)
    broken["panels"][1]["targets"][0].update(expr=expression, legendFormat=legend)

    assert any(problem in found for found in expression_problems(broken, known))


def test_every_metric_is_on_a_panel():
    shown = {use.name for _, target in targets(DASHBOARD) for use in uses(asked(target["expr"]))}
    histograms = {name.removesuffix("_bucket") for name in shown if name.endswith("_bucket")}

    for name in registered():
        part_of = re.sub(r"_(sum|count|bucket)$", "", name)
        assert name in shown or part_of in histograms, name


def test_limits_on_panels_are_those_of_the_alerts():
    rules = re.sub(r"\s+", " ", (MONITORING / "rules.yaml").read_text())
    steps = {
        panel["title"]: [
            step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]
        ]
        for panel in DASHBOARD["panels"]
        if panel["type"] == "timeseries"
    }

    assert steps["Wait for an engine"] == [1.6]
    assert 'stage="queue"}[5m]))) > 1.6' in rules
    assert steps["Device memory"] == [0.95]
    assert '(refinery_device_memory_bytes{job="vit-refinery"}) > 0.95' in rules
    assert steps["Error budget burn"] == steps["Latency budget burn"] == [1, 6, 14.4]
    assert steps["Whole request"] == [2.5]
    assert 'refinery_request_seconds_bucket{job="vit-refinery", le="2.5"}' in rules


def test_kubectl_can_apply_the_dashboard():
    config_map = {"kind": "ConfigMap", "data": {PATH.name: PATH.read_text()}}

    assert len(json.dumps(config_map)) < _MAX_ANNOTATION_BYTES


# On a CPU, and within seconds: no CUDA device, and nothing was recorded a day ago.
_EMPTY = {"Device memory A", "Found in any tier B"}


@pytest.fixture
def prometheus(tmp_path):
    """URL of a Prometheus with our rules that scrapes a service every 0.2 s; and the service's."""
    binary = program("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with running_server(tmp_path / "service.log", "--model", "models/demo") as service:
        scrape = {
            "job_name": "vit-refinery",
            "static_configs": [{"targets": [service.removeprefix("http://")]}],
        }
        configuration = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
            "rule_files": [str(tmp_path / "rules.yaml")],
            "scrape_configs": [scrape],
        }
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        rules = (MONITORING / "rules.yaml").read_text()
        (tmp_path / "rules.yaml").write_text(rules.replace("interval: 30s", "interval: 500ms"))
        command = [
            binary,
            f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
        ]
        with (tmp_path / "prometheus.log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, cwd=tmp_path)
        try:
            yield f"http://{address}", service
        finally:
            process.terminate()
            process.wait(30)


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def query(prometheus, expression):
    parameters = urllib.parse.urlencode({"query": expression})
    return get(f"{prometheus}/api/v1/query?{parameters}")["data"]["result"]


@pytest.mark.slow
def test_panels_show_a_running_service(prometheus):
    url, service = prometheus
    photograph = (ROOT / "examples" / "photographs" / "cat.jpg").read_bytes()

    def scraped():
        try:
            return query(url, 'refinery_ready{job="vit-refinery"}')
        except OSError:
            return []

    until(scraped)
    for use in ("refresh", "default", "refresh", "default"):
        request = urllib.request.Request(
            f"{service}/features?cache={use}", photograph, {"content-type": "image/jpeg"}
        )
        urllib.request.urlopen(request, timeout=30).read()
        time.sleep(0.5)
    until(lambda: query(url, "job:refinery_requests_slow:ratio_rate3d"))
    until(lambda: query(url, "job:refinery_cache_found:ratio_rate1h"))
    empty = {
        f"{panel['title']} {target['refId']}"
        for panel, target in targets(DASHBOARD)
        if not query(url, asked(target["expr"]).replace("[5m]", "[1m]"))
    }
    groups = get(f"{url}/api/v1/rules")["data"]["groups"]

    assert empty - {"Padding A"} == _EMPTY
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    assert get(f"{url}/api/v1/alerts")["data"]["alerts"] == []
