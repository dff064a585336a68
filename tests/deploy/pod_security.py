"""The restricted profile of the Pod Security Standards, and what we ask beyond it, of every pod."""

from collections.abc import Iterator, Sequence

from tests.deploy.manifests import Document, Pod, pods

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image",
    "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
_HIGH_USER = 10000


def findings(items: Sequence[Document]) -> list[str]:
    """Sentences about what is wrong."""
    return [f"{pod.name}: {text}" for pod in pods(items) for text in _of_pod(pod)]


def _of_pod(pod: Pod) -> Iterator[str]:
    spec, security = pod.spec, pod.spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if spec.get(field):
            yield f"{field} is on"
    if security.get("runAsNonRoot") is not True:
        yield "may run as root"
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if security.get(field, 0) < _HIGH_USER:
            yield f"{field} is {security.get(field)}: it may be one of the node's"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has not the seccomp profile RuntimeDefault"
    for field in ("supplementalGroups", "sysctls", "appArmorProfile", "seLinuxOptions"):
        if field in security:
            yield f"sets {field}"
    if spec.get("automountServiceAccountToken") is not False:
        yield "gets a token for the Kubernetes API"
    if spec.get("enableServiceLinks") is not False:
        yield "gets a variable for every Service"
    for volume in spec.get("volumes", []):
        kinds = volume.keys() - {"name"}
        if len(kinds) != 1 or not kinds <= _VOLUMES:
            yield f"volume {volume['name']} is of kind {', '.join(sorted(kinds))}"
        elif "emptyDir" in kinds and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} may fill the node"
    for container in pod.containers:
        for text in _of_container(container):
            yield f"{container['name']} {text}"


def _of_container(container: Document) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if security.get("privileged"):
        yield "is privileged"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "may write to its image"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    for field in ("runAsUser", "runAsNonRoot", "seccompProfile", "procMount", "seLinuxOptions"):
        if field in security:
            yield f"says otherwise than its pod: {field}"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield "takes a port of the node"
