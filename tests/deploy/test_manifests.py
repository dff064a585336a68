"""Every overlay renders, and what it renders is what the Kubernetes API takes."""

import json
import re
import subprocess

import pytest
import yaml

from tests.deploy.manifests import (
    EVERY,
    K8S,
    OPTIONS,
    OVERLAYS,
    SITE,
    documents,
    find,
    of_kind,
    own_documents,
    plain_jobs,
    put,
    with_options,
)
from tests.deploy.schemas import CUSTOM, violations
from tests.deploy.tools import tool

# The oldest one that k8s/README.md names, and some up to the newest whose schemas are there.
VERSIONS = ("1.31.0", "1.33.0", "1.35.0", "1.37.0")
# Checks of checkov that are not ours:
SKIPPED_CHECKS = (
    "CKV_K8S_11",  # limits of CPU: they stall threads that decode, and Redis' only one
    "CKV_K8S_15",  # asking the registry at each start: a laptop's cluster has no registry
    "CKV_K8S_43",  # digests: `unpinned_images` knows which images are a site's to pin
)
# Those that ask for probes of a pod that does nothing.
NO_PROBES = re.compile(r"CKV_K8S_[89] Pod\.[\w-]+\.loader")
_UNKNOWN = re.compile(r"Couldn't find schema for kind (\S+) ")


def written(folder, name, items):
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump_all(items))
    return str(file)


def refusals(version, *files):
    """What kubernetes-validate refuses, and kinds that neither it nor schemas.py knows."""
    command = [tool("kubernetes-validate"), "-k", version, "--strict", *files]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (run.stdout + run.stderr).splitlines()
    assert any("passed for resource" in line for line in lines), run.stderr
    found = [line for line in lines if not line.startswith(("INFO", "WARN"))]
    warnings = [line for line in lines if line.startswith("WARN")]
    for line in warnings:
        kind = _UNKNOWN.search(line)
        if kind is None or kind[1] not in CUSTOM:
            found.append(line)
    assert bool(run.returncode) == any(line not in warnings for line in found), run.stdout
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each overlay with what it needs, and the Jobs of JobSets, in a file."""
    folder = tmp_path_factory.mktemp("rendered")
    items = {name.replace("/", "-"): documents(name) for name in EVERY}
    return {name: written(folder, name, [*d, *plain_jobs(d)]) for name, d in items.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders(overlay):
    names = {f"{item['kind']}/{item['metadata']['name']}" for item in own_documents(overlay)}

    workload = {
        "loader": "Pod/loader",
        "train-job": "Job/trainer",
        "train-torchrun": "Job/trainer-node",
        "train-jobset": "JobSet/trainer-nodes",
    }.get(overlay, "Deployment/service")
    assert workload in names


def test_every_overlay_and_every_component_is_looked_at():
    assert sorted(OVERLAYS) == sorted(path.name for path in (K8S / "overlays").iterdir())
    components = {
        str(path.parent.relative_to(K8S)) for path in K8S.glob("components/**/kustomization.yaml")
    }
    folders = [K8S / name for name in SITE] + [K8S / "overlays" / name for name in OVERLAYS]
    used = set()
    while folders:
        folder = folders.pop()
        text = with_options((folder / "kustomization.yaml").read_text())
        found = [(folder / name).resolve() for name in yaml.safe_load(text).get("components", [])]
        used |= {str(path.relative_to(K8S)) for path in found}
        folders += found

    assert components <= used


def test_the_readme_names_what_there_is():
    readme = (K8S / "README.md").read_text()

    assert all(f"`{name}`" in readme for name in OVERLAYS)
    components = [path.name for path in (K8S / "components").iterdir() if path.name != "gpu"]
    assert [name for name in components if f"`{name}`" not in readme] == []
    folders = re.findall(r"(?:apply|delete) -k (k8s/\S+)", readme)
    assert len(folders) > len(OVERLAYS)
    for folder in folders:
        assert (K8S.parent / folder / "kustomization.yaml").is_file()


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version, files):
    # Volumes of images came with 1.31, as an alpha feature whose schema is there.
    assert refusals(version, *files.values()) == []


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("spec replica", 2, "replica"),
        ("spec replicas", "two", "two"),
        ("spec template spec containers 0 imagePullPolice", "Always", "imagePullPolice"),
        ("apiVersion", "apps/v1beta1", "Deployment"),
        ("kind", "Deploiment", "Deploiment"),
    ],
)
def test_what_kubernetes_does_not_know_is_refused(tmp_path, path, value, word):
    items = documents("cpu")
    put(items, "Deployment/service", path, value)

    (refusal, *_) = refusals("1.35.0", written(tmp_path, "wrong", items))

    assert word in refusal


def test_the_jobs_of_a_jobset_are_validated(tmp_path):
    items = documents("train-jobset")
    put(items, "JobSet/trainer-nodes", "spec replicatedJobs 0 template spec completion", 2)

    (refusal, *_) = refusals("1.35.0", written(tmp_path, "wrong", [*items, *plain_jobs(items)]))

    assert "completion" in refusal


@pytest.mark.parametrize("overlay", EVERY)
def test_custom_resources_keep_to_their_schemas(overlay):
    for item in of_kind(documents(overlay), *CUSTOM):
        assert list(violations(item)) == []


def test_every_schema_of_a_custom_resource_is_used():
    kinds = {item["kind"] for overlay in (*OVERLAYS, OPTIONS) for item in documents(overlay)}

    assert CUSTOM.keys() <= kinds


TRIGGER = "spec triggers 0 metadata"


@pytest.mark.parametrize(
    ("overlay", "name", "path", "value", "sentence"),
    [
        ("h100", "ScaledObject/service", f"{TRIGGER} threshold", 1, "1 is not of type"),
        ("h100", "ScaledObject/service", f"{TRIGGER} ignoreNullValues", "true", "ignoreNull"),
        ("h100", "ScaledObject/service", f"{TRIGGER} querry", "up", "querry"),
        ("h100", "ScaledObject/service", "spec fallback behavior", "keep", "behavior"),
        ("h100", "ScaledObject/service", "spec minReplicaCount", 0, "minReplicaCount"),
        ("h100", "ScaledObject/service", "spec maxReplicaCount", 1, "at least than at most"),
        ("h100", "ServiceMonitor/service", "spec endpoints 0 interval", "15", "interval"),
        ("h100", "ServiceMonitor/service", "spec endpoints 0 targetport", 1, "targetport"),
        ("h100", "ServiceMonitor/service", "spec selector matchLabels", None, "matchLabels"),
        ("h100", "PrometheusRule/vit-refinery", "spec groups 0 rules 0 expr", None, "oneOf"),
        ("h100", "PrometheusRule/vit-refinery", "spec groups 0 rules 0 alert", "A", "oneOf"),
        ("h100", "PrometheusRule/vit-refinery", "spec group", [], "group"),
        (OPTIONS, "HTTPRoute/service", "spec rules 0 timeouts request", "75", "75"),
        (OPTIONS, "HTTPRoute/service", "spec parentRefs 0 sectionName", None, "sectionName"),
        ("train-jobset", "JobSet/trainer-nodes", "apiVersion", "jobset.x-k8s.io/v1", "v1"),
        ("train-jobset", "JobSet/trainer-nodes", "spec failurePolicy maxRestart", 3, "maxRestart"),
        (
            "train-jobset",
            "JobSet/trainer-nodes",
            "spec failurePolicy rules 0 action",
            "x",
            "action",
        ),
        ("train-jobset", "JobSet/trainer-nodes", "spec replicatedJobs 0 replicas", 0, "replicas"),
    ],
)
def test_a_mistake_in_a_custom_resource_is_found(overlay, name, path, value, sentence):
    items = documents(overlay)
    put(items, name, path, value)

    assert sentence in "\n".join(
        violations(find(items, name.split("/")[0] + "/" + name.split("/")[1]))
    )


def checkov(*files):
    """Failed checks, as `ID resource`."""
    command = [tool("checkov"), "--framework", "kubernetes", "--output", "json", "--skip-download"]
    command += ["--skip-check", ",".join(SKIPPED_CHECKS)]
    command += [word for file in files for word in ("-f", file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(run.stdout)
    assert report["summary"]["passed"], run.stdout
    assert not report["summary"]["parsing_errors"]
    return [f"{one['check_id']} {one['resource']}" for one in report["results"]["failed_checks"]]


def test_checkov_finds_nothing(files):
    found = checkov(*files.values())

    assert [finding for finding in found if not NO_PROBES.fullmatch(finding)] == []


def test_checkov_finds_what_is_wrong(tmp_path):
    items = documents("cpu")
    put(items, "Deployment/service", "spec template spec containers 0 securityContext", None)

    found = checkov(written(tmp_path, "wrong", items))

    assert "CKV_K8S_20 Deployment.vit-refinery.service" in found


def test_dashboards_are_found_by_grafana():
    dashboards = find(documents("h100"), "ConfigMap/dashboards")

    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {path.name for path in (K8S / "components" / "monitoring" / "dashboards").iterdir()}
    assert dashboards["data"].keys() == files
    # `kubectl apply` keeps a copy in an annotation, and annotations have 256 KiB.
    assert len(json.dumps(dashboards)) < 250_000
