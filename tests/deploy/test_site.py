"""What a site copies and changes: nothing of ours that it must replace stays in what it applies."""

import re
import shutil

import pytest

from service.keys import main as make_keys
from service.settings import Settings
from tests.deploy.manifests import (
    K8S,
    OPTIONS,
    SITE,
    documents,
    find,
    kustomize,
    of_kind,
    own_documents,
    parse,
    pods,
    quantity,
    rendered,
)

# What is a site's to replace, and an overlay of ours in which it is.
PLACEHOLDERS = {
    "image of the service": (r"\bimage: vit-refinery-service:", "h100"),
    "image of the trainer": (r"\bimage: vit-refinery-trainer:", "train-job"),
    "image of the loader": (r"\bimage: vit-refinery-trainer:", "loader"),
    "image of Redis": (r"\bimage: redis@", "h100"),
    "image of a model": (r"registry\.example/", "h100 with model-image"),
    "digest": (r"sha256:0{64}", "h100 with model-image"),
    "storage class": (r"storageClassName: shared-files$", "volumes"),
    "namespace": (r"namespace: vit-refinery$", "h100"),
    "asked namespace": (r'namespace="vit-refinery"', "h100"),
    "address of Prometheus": (r"prometheus-operated", "h100"),
    "most replicas": (r"maxReplicaCount: 8$", "h100"),
    "label of monitors": (r"release: kube-prometheus-stack$", "h100"),
    "model": (r"/models/runs/first\b", "h100"),
    "output": (r"/models/runs/first\b", "train-job"),
    "backbone": (r"siglip2-so400m", "train-job"),
    "host of the Ingress": (r"\bvit-refinery\.example$", "h100 with ingress-nginx"),
    "host of the route": (r"\bvit-refinery\.example$", "h100 with gateway"),
    "Gateway": (r"namespace: gateway$", "h100 with gateway"),
}
APPLIED = ("example-site/volumes", *SITE, OPTIONS)


def fields(value, key="-"):
    """`key: value` of every field, however deep."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else (("-", item) for item in value)
        for inner, item in pairs:
            yield from fields(item, inner)
    else:
        yield f"{key}: {value}"


def left(placeholder, text):
    """Where a placeholder is in what is applied; what a dashboard shows is not looked at."""
    items = [item for item in parse(text) if item["metadata"]["name"] != "dashboards"]
    return [
        field for field in fields(items) if re.search(f"(?m){PLACEHOLDERS[placeholder][0]}", field)
    ]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_site_replaces_what_is_its_own(placeholder):
    _, ours = PLACEHOLDERS[placeholder]

    assert left(placeholder, rendered(ours))
    assert {name: left(placeholder, rendered(name)) for name in APPLIED} == {
        name: [] for name in APPLIED
    }


@pytest.mark.parametrize(
    ("file", "line", "folder", "placeholder"),
    [
        ("site", "  - name: vit-refinery-service", "service", "image of the service"),
        ("site", "namespace: vit-refinery-site", "service", "namespace"),
        ("service", "  - ../../components/keda/own-namespace", "service", "asked namespace"),
        ("service", "      - REFINERY_MODEL=/models/runs/second/refined", "service", "model"),
    ],
)
def test_a_setting_that_is_not_made_is_found(tmp_path, file, line, folder, placeholder):
    site = shutil.copytree(K8S, tmp_path / "k8s") / "example-site"
    changed = site / file / "kustomization.yaml"
    text = changed.read_text()
    assert f"{line}\n" in text
    instead = "  - name: another" if "- name:" in line else ""
    changed.write_text(text.replace(f"{line}\n", f"{instead}\n"))

    assert left(placeholder, kustomize(site / folder))


def test_a_site_pins_every_image_and_says_who_pulls_it():
    images = {pod.name: pod for name in SITE for pod in pods(own_documents(name))}

    assert images.keys() == {
        "Deployment/service", "Deployment/redis", "Pod/loader", "Job/trainer-second",
    }  # fmt: skip
    for pod in images.values():
        assert all(
            re.fullmatch(r"registry\.site\.example/[\w-]+@sha256:\w{64}", container["image"])
            for container in pod.containers
        )
        assert pod.spec["imagePullSecrets"] == [{"name": "registry"}]


def test_alerts_know_the_namespace_of_the_site():
    rules = (K8S / "components" / "monitoring" / "kubernetes-rules.yaml").read_text()
    (namespace,) = of_kind(own_documents("example-site/volumes"), "Namespace")
    patterns = re.findall(r'namespace=~"([^"]+)"', rules)

    assert patterns
    assert all(re.fullmatch(one, namespace["metadata"]["name"]) for one in patterns)


def test_the_readme_makes_the_key_that_the_service_reads(tmp_path, capsys):
    readme = (K8S / "README.md").read_text()
    (line,) = re.findall(r"python -m service\.keys (new .+)", readme)
    (volume,) = (
        volume
        for pod in pods(own_documents("cpu"))
        for volume in pod.spec["volumes"]
        if volume["name"] == "api-keys"
    )
    secret, file = re.findall(r"create secret generic (\S+) --from-file=(\S+)", readme)[0]

    status = make_keys(line.replace("/keys", str(tmp_path)).split())

    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert volume["secret"]["secretName"] == secret
    assert [item["key"] for item in volume["secret"]["items"]] == [file]
    assert capsys.readouterr().out.strip()


def test_the_readme_asks_a_port_that_there_is():
    readme = (K8S / "README.md").read_text()
    name, port = re.findall(r"port-forward service/(\S+) \d+:(\d+)", readme)[0]
    ports = {
        one["name"]: one["port"]
        for one in find(own_documents("cpu"), f"Service/{name}")["spec"]["ports"]
    }

    assert ports["http"] == int(port)


def test_a_proxy_leaves_it_to_the_service_to_refuse():
    settings = Settings(model=["models/demo"])
    items = documents(OPTIONS)
    data = find(items, "ConfigMap/service-settings")["data"]
    annotations = find(items, "Ingress/service")["metadata"]["annotations"]
    nginx = {key.rpartition("/")[2]: value for key, value in annotations.items()}
    (rule,) = find(items, "HTTPRoute/service")["spec"]["rules"]

    assert not {"REFINERY_MAX_BODY_BYTES", "REFINERY_REQUEST_SECONDS"} & data.keys()
    # Its m are what Kubernetes calls Mi.
    body = quantity(nginx["proxy-body-size"].replace("m", "Mi"))
    assert settings.max_body_bytes < body < 1.1 * settings.max_body_bytes
    assert nginx.keys() == {"proxy-body-size", "proxy-read-timeout", "proxy-send-timeout"}
    assert settings.request_seconds < int(nginx["proxy-read-timeout"])
    assert settings.request_seconds < int(rule["timeouts"]["request"].removesuffix("s"))


def test_the_loader_writes_to_what_jobs_read_and_to_what_the_service_reads():
    (pod,) = pods(own_documents("loader"))
    claims = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod.spec["volumes"]}
    (container,) = pod.containers
    there = {
        item["metadata"]["name"] for item in of_kind(documents("volumes"), "PersistentVolumeClaim")
    }

    assert {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]} == {
        "/models": "models",
        "/images": "training-images",
    }
    assert set(claims.values()) < there
    assert not any(mount.get("readOnly") for mount in container["volumeMounts"])
    assert pod.spec["activeDeadlineSeconds"] <= 86400
