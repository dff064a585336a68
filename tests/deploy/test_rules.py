"""Rules of Prometheus: they refer to what the service has, and fire when they should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.components.monitoring.generator.__main__ import RULE_FILES, made_files
from tests.deploy.promql import TARGET_LABELS, Known, problems, registered, uses
from tests.deploy.tools import program
from tests.support import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"
UNIT_TESTS = sorted((MONITORING / "rules_test").glob("*.yaml"))
# Of kube-state-metrics, as its docs/metrics/workload lists them.
_KUBERNETES = {
    "kube_deployment_status_condition": {"deployment", "condition", "status"},
    "kube_deployment_status_replicas_ready": {"deployment"},
    "kube_deployment_spec_replicas": {"deployment"},
    "kube_horizontalpodautoscaler_status_desired_replicas": {"horizontalpodautoscaler"},
    "kube_horizontalpodautoscaler_spec_max_replicas": {"horizontalpodautoscaler"},
    "kube_job_failed": {"job_name", "condition"},
    "kube_job_status_start_time": {"job_name"},
    "kube_job_status_active": {"job_name"},
}


def promtool(*arguments, folder=None):
    """Exit status and everything that promtool says."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def load(name):
    groups = yaml.safe_load((MONITORING / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


RULES = {name: load(name) for name in RULE_FILES}
ALERTS = [rule for rules in RULES.values() for rule in rules if "alert" in rule]


def recorded(rules):
    """What the rules record is a series too: by job and namespace, all of it."""
    names = [rule["record"] for rule in rules if "record" in rule]
    assert all(name.startswith("job:") for name in names)
    return {name: Known("gauge", frozenset({"job", "namespace"})) for name in names}


@pytest.fixture(scope="module")
def known():
    return registered() | recorded(RULES["rules.yaml"]) | {"up": Known("gauge", TARGET_LABELS)}


@pytest.mark.parametrize("name", RULE_FILES)
def test_promtool_takes_the_rules(name):
    assert promtool("check", "rules", "--lint-fatal", MONITORING / name)[0] == 0


def test_promtool_refuses_an_expression_that_does_not_parse(tmp_path):
    text = (MONITORING / "rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(text.replace("[5m]", "[5 minutes]", 1))

    status, said = promtool("check", "rules", "--lint-fatal", tmp_path / "rules.yaml")

    assert status != 0
    assert "could not parse expression" in said


@pytest.mark.slow
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_keep_silent_as_written(path):
    status, said = promtool("test", "rules", path)

    assert status == 0, said


@pytest.mark.parametrize(
    ("unit_test", "right", "wrong"),
    [
        ("load", "> 0.05", "> 0.5"),  # no longer fires
        ("load", "> 0.25", "> 0.05"),  # fires too early
        ("load", "for: 10m", "for: 1h"),
        ("faults", 'code=~"internal|encoding_failed"', 'code=~".*"'),
    ],
)
def test_unit_tests_notice_a_changed_rule(tmp_path, unit_test, right, wrong):
    text = (MONITORING / "rules.yaml").read_text()
    assert right in text
    (tmp_path / "rules.yaml").write_text(text.replace(right, wrong))
    (tmp_path / "rules_test").mkdir()
    shutil.copy(MONITORING / "rules_test" / f"{unit_test}.yaml", tmp_path / "rules_test")

    status, said = promtool("test", "rules", tmp_path / "rules_test" / f"{unit_test}.yaml")

    assert status != 0
    assert "FAILED" in said


def untested(alerts, unit_tests):
    """(alert, window, what no unit test shows of it)."""
    fires, silent = set(), set()
    for unit_test in unit_tests:
        for case in (case for group in unit_test["tests"] for case in group["alert_rule_test"]):
            if not case["exp_alerts"]:
                silent.add(case["alertname"])
            for alert in case["exp_alerts"]:
                fires.add((case["alertname"], alert["exp_labels"].get("window")))
    for alert in alerts:
        name, window = alert["alert"], alert["labels"].get("window")
        if (name, window) not in fires:
            yield name, window, "fires"
        if name not in silent:
            yield name, window, "is silent"


def test_every_alert_is_tested_both_firing_and_silent():
    unit_tests = [yaml.safe_load(path.read_text()) for path in UNIT_TESTS]
    assert list(untested(ALERTS, unit_tests)) == []

    invented = {"alert": "Invented", "labels": {}}

    assert list(untested([invented], unit_tests)) == [
        ("Invented", None, "fires"),
        ("Invented", None, "is silent"),
    ]


def test_rules_refer_to_what_the_service_has(known):
    found = {
        rule.get("alert", rule.get("record")): wrong
        for rule in RULES["rules.yaml"]
        if (wrong := problems(rule["expr"], known))
    }

    # It asks for series that are new, which is no question of how fast they grow.
    raw = "refinery_errors_total counts since the process began: use rate or increase"
    assert found == {"RefineryInternalErrors": [raw, raw]}


def test_rules_of_kubernetes_refer_to_what_kube_state_metrics_has():
    known = {name: Known("gauge", TARGET_LABELS | labels) for name, labels in _KUBERNETES.items()}

    for rule in RULES["kubernetes-rules.yaml"]:
        assert problems(rule["expr"], known) == [], rule["alert"]


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("refinery_requests > 1", "refinery_requests does not exist"),
        ('rate(refinery_requests_total{code="500"}[5m])', "no label code"),
        ("sum by (job, code) (rate(refinery_requests_total[5m]))", "no label code, by which"),
        ("refinery_images_total > 5", "counts since the process began"),
        ("avg_over_time(refinery_images_total[5m])", "counts since the process began"),
        ("refinery_request_seconds_sum / refinery_request_seconds_count", "counts since"),
        ("rate(refinery_queue_images[5m])", "is a gauge"),
        ("histogram_quantile(0.9, sum(rate(refinery_request_seconds_bucket[5m])))", "over le"),
        ("sum by (job) (rate(refinery_request_seconds_bucket[5m]))", "over le"),
        ("sum(rate(refinery_request_seconds_bucket[5m]))", "over le"),
        ("histogram_quantile(0.9, rate(refinery_request_seconds_count[5m]))", "is no bucket"),
        ('rate(refinery_request_seconds_bucket{le="3"}[5m])', "no bucket that ends at 3"),
        ('rate(refinery_stage_seconds_count{stage="wait"}[5m])', "stage of .* is never wait"),
        ('rate(refinery_cache_errors_total{kind=~"full|lost"}[5m])', "kind of .* is never lost"),
        ("max without (le) (refinery_readyness)", "refinery_readyness does not exist"),
        ("up and (refinery_ready unless on (job) ready)", "^ready does not exist"),
    ],
)  # fmt: skip
def test_what_the_service_does_not_have_is_noticed(known, expression, wrong):
    assert any(re.search(wrong, problem) for problem in problems(expression, known))


def test_the_objective_for_latency_is_an_edge_of_the_buckets(known):
    edges = known["refinery_request_seconds_bucket"].edges
    bounds = re.findall(r'refinery_request_seconds_bucket\{.*?le="(.*?)"', str(RULES["rules.yaml"]))

    assert len(bounds) == 5  # the record and four alerts
    assert set(bounds) == {"2.5"}
    assert 2.5 in edges
    assert 3.0 not in edges


def unlabelled(alerts, unit_tests):
    """Alerts whose text shows labels that they do not have when they fire."""
    groups = [group for unit_test in unit_tests for group in unit_test["tests"]]
    labels = {}
    for case in (case for group in groups for case in group["alert_rule_test"]):
        for alert in case["exp_alerts"]:
            labels[case["alertname"]] = alert["exp_labels"].keys()
    for alert in alerts:
        shown = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
        if not shown <= labels[alert["alert"]]:
            yield alert["alert"]


def test_labels_that_a_description_shows_are_those_that_the_alert_has():
    unit_tests = [yaml.safe_load(path.read_text()) for path in UNIT_TESTS]
    assert list(unlabelled(ALERTS, unit_tests)) == []

    lacking = {"alert": "RefineryDown", "annotations": {"summary": "{{ $labels.instance }}"}}

    assert list(unlabelled([lacking], unit_tests)) == ["RefineryDown"]


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_rules_select_what_compose_and_kubernetes_call_it():
    (compose,) = read("docker/prometheus.yaml")["scrape_configs"]
    monitor = read("k8s/components/monitoring/servicemonitor.yaml")["spec"]
    # What the label is of every Service that it selects.
    name = monitor["selector"]["matchLabels"][monitor["jobLabel"]]
    expressions = [rule["expr"] for rule in RULES["rules.yaml"]]
    jobs = {use.matchers["job"] for text in expressions for use in uses(text) if use.matchers}

    assert jobs == {("=", compose["job_name"])} == {("=", name)}


def test_rules_of_kubernetes_select_the_names_of_the_manifests():
    folder = "k8s/components/trainer"
    made = {
        "namespace": ["vit-refinery", "vit-refinery-staging"],
        "deployment": [read("k8s/base/deployment.yaml")["metadata"]["name"]],
        "job_name": [
            read(f"{folder}/{path}.yaml")["metadata"]["name"]
            for path in ("job/job", "torchrun/job", "jobset/jobset")
        ],
    }
    for rule in RULES["kubernetes-rules.yaml"]:
        for use in uses(rule["expr"]):
            for label in use.matchers.keys() & made.keys():
                value = use.matchers[label][1]
                assert all(re.fullmatch(value, name) for name in made[label]), rule["alert"]
                assert not re.fullmatch(value, "another")


def test_a_training_job_is_reported_before_kubernetes_ends_it():
    (alert,) = (rule for rule in ALERTS if rule["alert"] == "RefineryTrainerRunsLong")
    seconds = int(re.search(r"> (\d+)", alert["expr"])[1])
    jobs = (ROOT / "k8s" / "components" / "trainer").rglob("*.yaml")
    deadlines = re.findall(
        r"activeDeadlineSeconds: (\d+)", "\n".join(path.read_text() for path in jobs)
    )

    assert deadlines
    assert all(seconds < int(deadline) for deadline in deadlines)


def outdated(folder):
    return [path.name for path, text in made_files(folder).items() if path.read_text() != text]


def test_files_that_are_made_of_others_are_up_to_date(tmp_path):
    assert outdated(MONITORING) == []

    copy = Path(shutil.copytree(MONITORING, tmp_path / "monitoring"))
    rules = copy / "rules.yaml"
    rules.write_text(rules.read_text().replace("for: 2m", "for: 3m"))

    assert outdated(copy) == ["prometheusrule.yaml"]


def test_the_object_for_the_operator_has_the_groups_of_both_files():
    rule = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    groups = [
        group
        for name in RULE_FILES
        for group in yaml.safe_load((MONITORING / name).read_text())["groups"]
    ]

    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"]["groups"] == groups
    names = [group["name"] for group in groups]
    assert len(names) == len(set(names))
