"""Checks of what workloads are told: numbers, deadlines, devices, and the programs' own options.

Each returns sentences about what is wrong, and nothing where all is well.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from service.command_line import parse_arguments
from service.settings import Settings, SettingsError
from tests.deploy.manifests import Document, Pod, find, of_kind, pods, quantity
from tests.deploy.trainer_commands import wrong_trainers

GPU = "nvidia.com/gpu"
# What the service needs after its drain: docs/operations.md, "Health, exit and drain".
_SECONDS_AFTER_DRAIN = 15
# Fields whose words no schema of kubernetes-validate knows.
_WORDS = {
    "completionMode": {"Indexed", "NonIndexed"},
    "effect": {"NoSchedule", "NoExecute", "PreferNoSchedule"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "imagePullPolicy": {"IfNotPresent", "Always", "Never"},
    "medium": {"", "Memory"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "pullPolicy": {"IfNotPresent", "Always", "Never"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "unhealthyPodEvictionPolicy": {"AlwaysAllow", "IfHealthyBudget"},
    "whenUnsatisfiable": {"ScheduleAnyway", "DoNotSchedule"},
}


def wrong_words(items: Sequence[Document]) -> Iterator[str]:
    for item in items:
        yield from _words(item.get("spec"), f"{item['kind']}/{item['metadata']['name']}")
    for item in of_kind(items, "Deployment"):
        kind = item["spec"]["strategy"]["type"]
        if kind not in ("RollingUpdate", "Recreate"):
            yield f"Deployment/{item['metadata']['name']}: no strategy is called {kind}"
    for item in of_kind(items, "PodDisruptionBudget"):
        if not isinstance(item["spec"].get("maxUnavailable"), int):
            yield "a PodDisruptionBudget without a number of pods that may be unavailable"


def wrong_resources(items: Sequence[Document]) -> Iterator[str]:
    for item in of_kind(items, "PersistentVolumeClaim"):
        yield from _quantities("a claim", item["spec"]["resources"]["requests"])
    for pod in pods(items):
        for volume in pod.spec.get("volumes", []):
            if limit := volume.get("emptyDir", {}).get("sizeLimit"):
                yield from _quantities(f"{pod.name}: volume {volume['name']}", {"sizeLimit": limit})
        for container in pod.containers:
            yield from _container_resources(pod, container)


def wrong_deadlines(items: Sequence[Document]) -> Iterator[str]:
    """A pod has the time to start and to end."""
    for item in of_kind(items, "Deployment"):
        for container in item["spec"]["template"]["spec"]["containers"]:
            probe = container.get("startupProbe")
            if not probe:
                continue
            seconds = probe["periodSeconds"] * probe["failureThreshold"]
            if item["spec"].get("progressDeadlineSeconds", 600) <= seconds:
                yield f"{item['metadata']['name']} is given up before its {seconds} s are over"
    for pod in pods(items):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.containers:
            settings = _environment(items, container)
            sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
            drain = settings.get("REFINERY_DRAIN_SECONDS")
            if drain is None:
                continue
            if not sleep.get("seconds"):
                yield f"{pod.name} refuses requests before others know that it ends: no preStop"
            needed = sleep.get("seconds", 0) + float(drain) + _SECONDS_AFTER_DRAIN
            if grace <= needed:
                yield f"{pod.name} is killed after {grace} s and needs more than {needed:.0f}"


def wrong_devices(items: Sequence[Document]) -> Iterator[str]:
    """Whole GPUs, on nodes that have the right ones, without a rollout that waits for a spare."""
    for pod in pods(items):
        limits = [container["resources"]["limits"] for container in pod.containers]
        if not any(GPU in limit for limit in limits):
            continue
        required = pod.spec.get("affinity", {}).get("nodeAffinity", {})
        terms = required.get("requiredDuringSchedulingIgnoredDuringExecution", {})
        for term in terms.get("nodeSelectorTerms", [{}]):
            asked = {one["key"]: one for one in term.get("matchExpressions", [])}
            products = asked.get("nvidia.com/gpu.product", {}).get("values", [])
            if not products or not all("H100" in name or "H200" in name for name in products):
                yield f"{pod.name} may land on any GPU"
            driver = asked.get("nvidia.com/cuda.driver.major", {})
            if (driver.get("operator"), driver.get("values")) != ("Gt", ["579"]):
                yield f"{pod.name} may land on a driver that is too old for CUDA 13"
        if not any(one.get("key") == GPU for one in pod.spec.get("tolerations", [])):
            yield f"{pod.name} does not tolerate the taint of nodes with GPUs"
        if pod.owner["kind"] == "Deployment":
            strategy = pod.owner["spec"]["strategy"]
            surge = strategy.get("rollingUpdate", {}).get("maxSurge")
            if strategy["type"] != "Recreate" and surge != 0:
                yield f"{pod.name}: a rollout waits for a GPU that nobody has"


def wrong_services(items: Sequence[Document]) -> Iterator[str]:
    """The service accepts its settings, and they fit its pod."""
    for pod in pods(items):
        for container in pod.containers:
            if container["name"] == "service":
                yield from _service(items, pod, container)


def wrong_caches(items: Sequence[Document]) -> Iterator[str]:
    """Redis evicts before it is killed."""
    for pod in pods(items):
        for container in pod.containers:
            if container["name"] != "redis":
                continue
            words = container["args"]
            options = dict(zip(words[::2], words[1::2], strict=True))
            limit = quantity(container["resources"]["limits"]["memory"])
            most = options["--maxmemory"]
            if limit < 1.3 * quantity(most.replace("mb", "Mi").replace("gb", "Gi")):
                yield f"{pod.name}: maxmemory {most} is too near to the memory limit"
            wanted = {"--save": "", "--appendonly": "no", "--maxmemory-policy": "allkeys-lfu"}
            for option, value in wanted.items():
                if options.get(option) != value:
                    yield f"{pod.name}: {option} is {options.get(option)!r}"


CHECKS = (
    wrong_words,
    wrong_deadlines,
    wrong_devices,
    wrong_services,
    wrong_caches,
    wrong_trainers,
)


def findings(items: Sequence[Document]) -> list[str]:
    # First, since the others count with these numbers.
    if found := list(wrong_resources(items)):
        return found
    return [finding for check in CHECKS for finding in check(items)]


def _words(value: object, name: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _words(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in _WORDS and item not in _WORDS[key]:
                yield f"{name}: {key} cannot be {item!r}"
            if key == "seccompProfile" and item.get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{name}: no seccomp profile is called {item.get('type')!r}"
            yield from _words(item, name)


def _quantities(name: str, amounts: dict[str, str]) -> Iterator[str]:
    for resource, amount in amounts.items():
        try:
            quantity(amount)
        except ValueError as error:
            yield f"{name}: {resource} {error}"


def _container_resources(pod: Pod, container: Document) -> Iterator[str]:
    requests, limits = (container["resources"].get(key, {}) for key in ("requests", "limits"))
    wrong = [*_quantities(pod.name, requests), *_quantities(pod.name, limits)]
    yield from wrong
    if wrong:
        return
    for resource in ("cpu", "memory", "ephemeral-storage"):
        if resource not in requests:
            yield f"{pod.name} requests no {resource}"
        elif resource in limits and quantity(requests[resource]) > quantity(limits[resource]):
            yield f"{pod.name} requests more {resource} than its limit"
    for resource in ("memory", "ephemeral-storage"):
        if resource not in limits:
            yield f"{pod.name} has no limit of {resource}"
    if "cpu" in limits:
        yield f"{pod.name} has a limit of CPU, which stalls the threads that decode"
    gpus = limits.get(GPU)
    if requests.get(GPU, gpus) != gpus or (gpus is not None and not str(gpus).isdigit()):
        yield f"{pod.name} requests {requests.get(GPU)} GPUs and has a limit of {gpus}"


def _environment(items: Sequence[Document], container: Document) -> dict[str, str]:
    """The variables that Kubernetes gives a container."""
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        with contextlib.suppress(KeyError):  # what is missing, references.py says
            variables |= find(items, f"ConfigMap/{source['configMapRef']['name']}")["data"]
    for entry in container.get("env", []):
        field = entry.get("valueFrom", {}).get("resourceFieldRef")
        if field:
            kind, resource = field["resource"].split(".")
            cores = quantity(container["resources"][kind][resource])
            variables[entry["name"]] = str(math.ceil(cores / quantity(field["divisor"])))
        elif "value" in entry:
            variables[entry["name"]] = entry["value"]
    return variables


def _service(items: Sequence[Document], pod: Pod, container: Document) -> Iterator[str]:
    for name, value in _environment(items, container).items():
        if not isinstance(value, str):
            yield f"{pod.name}: {name} is no text, which a variable must be"
            return
    if container["args"][:3] != ["python", "-m", "service"]:
        yield f"{pod.name} does not start the service"
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            arguments = container["args"][3:]
            settings = parse_arguments(arguments, _environment(items, container)).settings
    except SettingsError as error:
        yield f"{pod.name}: the service refuses: {error}"
        return
    except SystemExit:
        yield f"{pod.name}: the service refuses: {said.getvalue()}"
        return
    yield from _fits(pod, container, settings)


def _fits(pod: Pod, container: Document, settings: Settings) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports != {"http": settings.port, "metrics": settings.metrics_port}:
        yield f"{pod.name} declares {ports} and listens elsewhere"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    files = [settings.api_key_file, *(path for path in settings.models.values() if path[0] == "/")]
    files += [settings.cache_password_file] if settings.cache_password_file else []
    for file in files:
        if file is None or not mounts & {str(path) for path in PurePosixPath(file).parents} | {
            path for path in mounts if path == str(file)
        }:
            yield f"{pod.name}: {file} is on no volume"
    has_gpu = GPU in container["resources"]["limits"]
    if settings.device != ("cuda" if has_gpu else "cpu"):
        yield f"{pod.name} has {'a' if has_gpu else 'no'} GPU and serves from {settings.device}"
    hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]
    if hidden == has_gpu:
        yield f"{pod.name}: NVIDIA_VISIBLE_DEVICES hides its GPU, or shows those of others"
    memory = quantity(container["resources"]["limits"]["memory"])
    if (
        settings.cache_bytes + settings.max_held_body_bytes + settings.max_feature_bytes
        > memory / 2
    ):
        yield f"{pod.name}: cache, bodies and features may take more than half of its memory"
