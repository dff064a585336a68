"""What the manifests of an overlay say about each other holds."""

import pytest

from tests.deploy.manifests import (
    EVERY,
    MODEL_IMAGE,
    NEEDS_VOLUMES,
    documents,
    find,
    of_kind,
    own_documents,
    put,
)
from tests.deploy.references import findings

SERVICE, POD = "Deployment/service", "spec template spec"
CONTAINER = f"{POD} containers 0"
JOBSET_POD = "spec replicatedJobs 0 template spec template spec"
ELSEWHERE = {"matchLabels": {"app.kubernetes.io/component": "elsewhere"}}

# Overlay, document, field, its new value (None: gone), and what a check says of it.
MISTAKES = {
    "namespace": ("cpu", SERVICE, "metadata namespace", "default", "lands in namespace default"),
    "no namespace": ("train-job", "Job/trainer", "metadata namespace", None, "namespace None"),
    "other namespace": ("cpu", "Namespace/vit-refinery", "metadata name", "x", "x is not vit"),
    "same name": ("cpu", "Service/redis", "metadata name", "vit-refinery", "is there twice"),
    "tag": ("cpu", SERVICE, f"{CONTAINER} image", "r.example/a:1", "a:1 has no digest"),
    "short digest": ("cpu", SERVICE, f"{CONTAINER} image", "a@sha256:00", "has no digest"),
    "tag in a jobset": ("train-jobset", "JobSet/trainer-nodes", f"{JOBSET_POD} containers 0 image",
                        "trainer", "image trainer has no digest"),
    "tag of a model": (MODEL_IMAGE, SERVICE, f"{POD} volumes 1 image reference", "model:1",
                       "model:1 has no digest"),
    "no volume": ("cpu", SERVICE, f"{POD} volumes 0", None, "mount /tmp of no volume tmp"),
    "no mount": ("cpu", SERVICE, f"{CONTAINER} volumeMounts 1", None, "cache is not mounted"),
    "written to": ("h100", SERVICE, f"{CONTAINER} volumeMounts 0 readOnly", None, "is read-only"),
    "one path": ("cpu", SERVICE, f"{CONTAINER} volumeMounts 1 mountPath", "/tmp", "two mounts"),
    "configmap": ("cpu", SERVICE, f"{CONTAINER} envFrom 0 configMapRef name", "service-settings",
                  "no ConfigMap service-settings"),
    "secret": ("cpu", SERVICE, f"{POD} volumes 2 secret secretName", "keys", "no Secret keys"),
    "secret in a variable": ("cpu", SERVICE, f"{CONTAINER} env 0 valueFrom",
                             {"secretKeyRef": {"name": "x"}}, "no Secret x"),
    "claim": ("train-job", "PersistentVolumeClaim/models", "metadata name", "other",
              "no PersistentVolumeClaim models"),
    "account": ("cpu", SERVICE, f"{POD} serviceAccountName", "x", "no ServiceAccount x"),
    "selector": ("cpu", SERVICE, "spec selector", ELSEWHERE, "does not select its own pods"),
    "spread": ("cpu", SERVICE, f"{POD} topologySpreadConstraints 0 labelSelector", ELSEWHERE,
               "is spread by labels"),
    "budget": ("cpu", "PodDisruptionBudget/service", "spec selector", ELSEWHERE, "selects no pod"),
    "service": ("cpu", "Service/redis", "spec selector", {"app": "x"}, "redis selects no pod"),
    "scaled": ("h100", "ScaledObject/service", "spec scaleTargetRef name", "x", "is not there"),
    "replicas": ("h100", SERVICE, "spec replicas", 2, "has replicas and is scaled"),
    "port": ("cpu", SERVICE, f"{CONTAINER} ports 0 containerPort", 800000, "800000 is no port"),
    "target port": ("cpu", "Service/vit-refinery", "spec ports 0 targetPort", "w", "the port w"),
    "probe": ("cpu", SERVICE, f"{CONTAINER} livenessProbe httpGet port", "web", "asks port web"),
    "monitor": ("h100", "ServiceMonitor/service", "spec selector", ELSEWHERE, "selects 0 Services"),
    "monitored port": ("h100", "ServiceMonitor/service", "spec endpoints 0 port", "x", "called x"),
    "job label": ("h100", "ServiceMonitor/service", "spec jobLabel", "x", "has no label x"),
    "no denial": ("cpu", "NetworkPolicy/default-deny", "spec policyTypes", ["Ingress"],
                  "no NetworkPolicy denies"),
    "policy": ("cpu", "NetworkPolicy/redis", "spec podSelector", ELSEWHERE, "redis selects no pod"),
    "policy port": ("cpu", "NetworkPolicy/redis", "spec ingress 0 ports 0 port", 1, "on port 1"),
    "way out": ("cpu", "NetworkPolicy/service-to-redis", "spec egress 0 ports 0 port", 2, "port 2"),
    "everybody in": ("cpu", "NetworkPolicy/redis", "spec ingress 0 from", None, "in everybody"),
    "everybody out": ("cpu", "NetworkPolicy/service", "spec egress 0 to", [], "out to everybody"),
    "no peer": ("cpu", "NetworkPolicy/redis", "spec ingress 0 from 0 podSelector", ELSEWHERE,
                "a peer that selects no pod"),
    "any peer": ("cpu", "NetworkPolicy/redis", "spec ingress 0 from 0", {}, "an empty peer"),
    "type": ("cpu", "NetworkPolicy/service", "spec policyTypes", ["Ingress"], "and not the type"),
}  # fmt: skip


@pytest.mark.parametrize("overlay", EVERY)
def test_an_overlay_refers_to_nothing_that_is_not_there(overlay):
    assert findings(documents(overlay)) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_reference_is_found(mistake):
    overlay, name, path, value, sentence = MISTAKES[mistake]
    items = documents(overlay)

    put(items, name, path, value)

    assert sentence in "\n".join(findings(items))


@pytest.mark.parametrize("overlay", NEEDS_VOLUMES)
def test_deleting_an_overlay_takes_neither_namespace_nor_volumes(overlay):
    assert not of_kind(own_documents(overlay), "Namespace", "PersistentVolumeClaim")


def test_the_overlay_for_laptops_needs_nothing_else():
    items = own_documents("cpu")

    assert find(items, "Namespace/vit-refinery")
    assert not of_kind(items, "PersistentVolumeClaim", "ScaledObject", "ServiceMonitor")


def test_only_the_service_reaches_redis_and_only_names_are_reached_from_it():
    items = documents("cpu")

    (rule,) = find(items, "NetworkPolicy/redis")["spec"]["ingress"]
    (peer,) = rule["from"]
    (out,) = find(items, "NetworkPolicy/service")["spec"]["egress"]

    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "service"
    assert not find(items, "NetworkPolicy/redis")["spec"].get("egress")
    assert {port["port"] for port in out["ports"]} == {53}


def test_metrics_are_for_monitoring_alone():
    rules = find(documents("h100"), "NetworkPolicy/service")["spec"]["ingress"]

    admitted = {
        port["port"]: [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"]]
        for rule in rules
        for port in rule["ports"]
    }

    assert admitted == {
        8000: [{"vit-refinery/client": "true"}],
        9090: [{"kubernetes.io/metadata.name": "monitoring"}],
    }


@pytest.mark.parametrize("overlay", ["train-job", "train-torchrun"])
def test_a_trainer_on_one_node_has_no_network(overlay):
    policies = [item["metadata"]["name"] for item in of_kind(documents(overlay), "NetworkPolicy")]

    assert policies == ["default-deny"]
