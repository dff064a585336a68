"""What the manifests of an overlay say about each other holds."""

import pytest

from tests.deploy.manifests import (
    EVERY,
    MODEL_IMAGE,
    OPTIONS,
    OVERLAYS,
    REDIS_PASSWORD,
    SITE,
    added,
    documents,
    find,
    of_kind,
    own_documents,
    parse,
    pods,
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
    "other namespace": ("cpu", "Namespace/vit-refinery", "metadata name", "x",
                        "Service/vit-refinery lands in namespace vit-refinery"),
    "asked namespace": ("h100", "ScaledObject/service", "spec triggers 0 metadata query",
                        'up{namespace="x"}', "asks for namespaces ['x']"),
    "any namespace": ("h100", "ScaledObject/service", "spec triggers 0 metadata query",
                      "up", "asks for namespaces []"),
    "route's Service": (OPTIONS, "Ingress/service",
                        "spec rules 0 http paths 0 backend service name", "web",
                        "leads to ('web', 'http'), which is not there"),
    "route's port": (OPTIONS, "HTTPRoute/service", "spec rules 0 backendRefs 0 port", 8000,
                     "leads to ('vit-refinery', 8000), which is not there"),
    "route to metrics": (OPTIONS, "HTTPRoute/service", "spec rules 0 backendRefs 0 port", 9090,
                         "shows metrics"),
    "host without TLS": (OPTIONS, "Ingress/service", "spec rules 0 host", "x.example",
                         "a host without TLS"),
    "certificate": (OPTIONS, "Ingress/service", "spec tls 0 secretName", "x", "no Secret x"),
    "listener": (OPTIONS, "HTTPRoute/service", "spec parentRefs 0 sectionName", None,
                 "without TLS"),
    "who pulls": (SITE[0], "Deployment/redis", f"{POD} imagePullSecrets 0 name", "x",
                  "no Secret x"),
    "password": (REDIS_PASSWORD, "Deployment/redis", f"{POD} volumes 0 secret secretName", "x",
                 "no Secret x"),
    "other version": ("cpu", SERVICE, f"{CONTAINER} image", "vit-refinery-service:0.0.1",
                      "0.0.1 has no digest"),
    "claim of the loader": ("loader", "PersistentVolumeClaim/training-images", "metadata name",
                            "x", "Pod/loader: there is no PersistentVolumeClaim"),
    "same name": ("cpu", "Service/redis", "metadata name", "vit-refinery", "is there twice"),
    "tag": ("cpu", SERVICE, f"{CONTAINER} image", "r.example/a:1", "a:1 has no digest"),
    "short digest": ("cpu", SERVICE, f"{CONTAINER} image", "a@sha256:00", "has no digest"),
    "tag in a jobset": ("train-jobset", "JobSet/trainer-nodes", f"{JOBSET_POD} containers 0 image",
                        "trainer", "image trainer has no digest"),
    "tag of a model": (MODEL_IMAGE, SERVICE, f"{POD} volumes 0 image reference", "model:1",
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


@pytest.mark.parametrize("overlay", EVERY)
def test_deleting_an_overlay_takes_neither_namespace_nor_volumes(overlay):
    assert not of_kind(own_documents(overlay), "Namespace", "PersistentVolumeClaim")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_as_committed_all_is_in_one_namespace(overlay):
    assert find(documents(overlay), "Namespace/vit-refinery")


def test_the_overlay_for_laptops_needs_no_volume_and_no_custom_resource():
    items = documents("cpu")

    assert not of_kind(items, "PersistentVolumeClaim", "ScaledObject", "ServiceMonitor")


@pytest.mark.parametrize(
    ("components", "kind", "model"),
    [
        (["model-image"], "image", "refined=/models"),
        (["model-image", "model-pvc"], "persistentVolumeClaim", "refined=/models"),
    ],
)
def test_of_volume_and_image_of_a_model_the_last_one_counts(components, kind, model):
    items = [*own_documents("volumes"), *parse(added("h100", *components))]
    (pod,) = (pod for pod in pods(items) if pod.name == SERVICE)

    mounts = [mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]]
    (volume,) = (one for one in pod.spec["volumes"] if one["name"] == "models")

    assert volume.keys() == {"name", kind}
    assert [path for path in mounts if path.startswith("/models")] == ["/models"]
    assert find(items, "ConfigMap/service-settings")["data"]["REFINERY_MODEL"] == model
    assert findings(items) == []


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
