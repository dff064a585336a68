"""Every pod keeps to the restricted profile of the namespace."""

import pytest

from tests.deploy.manifests import EVERY, documents, find, pods, put
from tests.deploy.pod_security import findings

SERVICE, POD = "Deployment/service", "spec template spec"
CONTAINER = f"{POD} containers 0"
JOBSET_POD = "spec replicatedJobs 0 template spec template spec"

MISTAKES = {
    "network": (SERVICE, f"{POD} hostNetwork", True, "hostNetwork is on"),
    "root": (SERVICE, f"{POD} securityContext runAsNonRoot", False, "may run as root"),
    "user": (SERVICE, f"{POD} securityContext runAsUser", 0, "runAsUser is 0"),
    "low user": ("Deployment/redis", f"{POD} securityContext runAsUser", 999, "runAsUser is 999"),
    "no group": (SERVICE, f"{POD} securityContext fsGroup", None, "fsGroup is None"),
    "seccomp": (SERVICE, f"{POD} securityContext seccompProfile type", "runtimeDefault", "seccomp"),
    "sysctls": (SERVICE, f"{POD} securityContext sysctls", [{"name": "a"}], "sets sysctls"),
    "token": (SERVICE, f"{POD} automountServiceAccountToken", None, "gets a token"),
    "links": (SERVICE, f"{POD} enableServiceLinks", None, "a variable for every Service"),
    "volume": (SERVICE, f"{POD} volumes 0", {"name": "tmp", "hostPath": {"path": "/"}}, "hostPath"),
    "two kinds": (SERVICE, f"{POD} volumes 0 secret", {}, "of kind emptyDir, secret"),
    "size": (SERVICE, f"{POD} volumes 0 emptyDir", {}, "volume tmp may fill the node"),
    "gain": (SERVICE, f"{CONTAINER} securityContext allowPrivilegeEscalation", None, "may gain"),
    "privileged": (SERVICE, f"{CONTAINER} securityContext privileged", True, "is privileged"),
    "write": (SERVICE, f"{CONTAINER} securityContext readOnlyRootFilesystem", None, "may write"),
    "no context": (SERVICE, f"{CONTAINER} securityContext", None, "service keeps capabilities"),
    "capability": (
        SERVICE,
        f"{CONTAINER} securityContext capabilities add",
        ["SYS_PTRACE"],
        "keeps",
    ),
    "own user": (SERVICE, f"{CONTAINER} securityContext runAsUser", 0, "otherwise than its pod"),
    "port": (SERVICE, f"{CONTAINER} ports 0 hostPort", 80, "takes a port of the node"),
    "first container": (SERVICE, f"{POD} initContainers", [{"name": "setup"}], "setup may gain"),
}


@pytest.mark.parametrize("overlay", EVERY)
def test_every_pod_is_restricted(overlay):
    items = documents(overlay)

    assert list(pods(items))
    assert findings(items) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_pod_that_is_not_restricted_is_found(mistake):
    name, path, value, sentence = MISTAKES[mistake]
    items = documents("cpu")

    put(items, name, path, value)

    assert sentence in "\n".join(findings(items))


def test_a_pod_without_an_owner_is_looked_at():
    items = documents("loader")

    put(items, "Pod/loader", "spec securityContext runAsNonRoot", False)

    assert findings(items) == ["Pod/loader: may run as root"]


def test_pods_of_a_jobset_are_looked_at():
    items = documents("train-jobset")

    put(items, "JobSet/trainer-nodes", f"{JOBSET_POD} securityContext runAsNonRoot", False)

    assert findings(items) == ["JobSet/trainer-nodes: may run as root"]


@pytest.mark.parametrize("mode", ["enforce", "warn", "audit"])
def test_the_namespace_asks_for_the_restricted_profile_of_a_fixed_version(mode):
    labels = find(documents("h100"), "Namespace/vit-refinery")["metadata"]["labels"]

    assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
    # Image volumes are refused by earlier versions.
    assert labels[f"pod-security.kubernetes.io/{mode}-version"] == "v1.33"
