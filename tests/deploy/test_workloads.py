"""Workloads can start, run and end as their manifests tell them."""

import pytest

from tests.deploy.manifests import (
    EVERY,
    REDIS_PASSWORD,
    documents,
    find,
    put,
    quantity,
)
from tests.deploy.workloads import findings

SERVICE, POD = "Deployment/service", "spec template spec"
CONTAINER = f"{POD} containers 0"
JOB, NODE, NODES = "Job/trainer", "Job/trainer-node", "JobSet/trainer-nodes"
NODES_JOB = "spec replicatedJobs 0 template spec"
SETTINGS = "ConfigMap/service-settings"
PLACES = f"{POD} affinity nodeAffinity requiredDuringSchedulingIgnoredDuringExecution"
EXPRESSIONS = f"{PLACES} nodeSelectorTerms 0 matchExpressions"

# Overlay, document, field, its new value (None: gone), and what a check says of it.
MISTAKES = {
    "seccomp": ("cpu", SERVICE, f"{POD} securityContext seccompProfile type", "runtimeDefault",
                "no seccomp profile is called 'runtimeDefault'"),
    "spread": ("cpu", SERVICE, f"{POD} topologySpreadConstraints 0 whenUnsatisfiable", "Sometimes",
               "whenUnsatisfiable cannot be 'Sometimes'"),
    "strategy": ("cpu", SERVICE, "spec strategy type", "Rolling", "no strategy is called Rolling"),
    "budget": ("cpu", "PodDisruptionBudget/service", "spec maxUnavailable", "x",
               "without a number"),
    "unit": ("cpu", SERVICE, f"{CONTAINER} resources limits memory", "64GiB",
             "'64GiB' is no quantity"),
    "size": ("cpu", SERVICE, f"{POD} volumes 0 emptyDir sizeLimit", "1GB", "'1GB' is no quantity"),
    "claim": ("h100", "PersistentVolumeClaim/models", "spec resources requests storage", "1 Gi",
              "'1 Gi' is no quantity"),
    "more than limit": ("cpu", SERVICE, f"{CONTAINER} resources requests memory", "5Gi",
                        "more memory than its limit"),
    "no request": ("cpu", SERVICE, f"{CONTAINER} resources requests ephemeral-storage", None,
                   "requests no ephemeral-storage"),
    "no limit": ("cpu", SERVICE, f"{CONTAINER} resources limits memory", None,
                 "no limit of memory"),
    "throttled": ("cpu", SERVICE, f"{CONTAINER} resources limits cpu", "4", "has a limit of CPU"),
    "half a GPU": ("h100", SERVICE, f"{CONTAINER} resources limits nvidia.com/gpu", "0.5",
                   "of 0.5"),
    "two requests": ("h100", SERVICE, f"{CONTAINER} resources requests nvidia.com/gpu", "2",
                     "requests 2 GPUs and has a limit of 1"),
    "given up": ("cpu", SERVICE, "spec progressDeadlineSeconds", 600,
                 "is given up before its 600 s"),
    "killed": ("cpu", SERVICE, f"{POD} terminationGracePeriodSeconds", 55, "killed after 55 s"),
    "longer drain": ("cpu", SETTINGS, "data REFINERY_DRAIN_SECONDS", "60", "needs more than 85"),
    "no preStop": ("cpu", SERVICE, f"{CONTAINER} lifecycle", None, "no preStop"),
    "any GPU": ("h100", SERVICE, f"{EXPRESSIONS} 0", None, "may land on any GPU"),
    "other GPU": ("h100", SERVICE, f"{EXPRESSIONS} 0 values", ["NVIDIA-A100"],
                  "may land on any GPU"),
    "no affinity": ("train-job", JOB, f"{POD} affinity", None, "may land on any GPU"),
    "driver": ("h100", SERVICE, f"{EXPRESSIONS} 1 values", ["525"], "a driver that is too old"),
    "taint": ("train-torchrun", NODE, f"{POD} tolerations", [], "does not tolerate the taint"),
    "surge": ("h100", SERVICE, "spec strategy rollingUpdate maxSurge", 1, "waits for a GPU"),
    "jobset": ("train-jobset", NODES, f"{NODES_JOB} template spec affinity", {}, "any GPU"),
    "setting": ("cpu", SETTINGS, "data REFINERY_CACHE_BYTE", "1",
                "unknown variable REFINERY_CACHE"),
    "value": ("cpu", SETTINGS, "data REFINERY_PORT", "http", "REFINERY_PORT is 'http'"),
    "number": ("cpu", SETTINGS, "data REFINERY_PORT", 8000, "REFINERY_PORT is no text"),
    "flag": ("cpu", SERVICE, f"{CONTAINER} args 3", "--cash=off", "unrecognized arguments"),
    "program": ("cpu", SERVICE, f"{CONTAINER} args", ["sleep"], "does not start the service"),
    "port": ("cpu", SETTINGS, "data REFINERY_METRICS_PORT", "9091", "listens elsewhere"),
    "keys": ("cpu", SETTINGS, "data REFINERY_API_KEY_FILE", "/keys/api_keys", "is on no volume"),
    "password": (REDIS_PASSWORD, SETTINGS, "data REFINERY_CACHE_PASSWORD_FILE", "/keys/password",
                 "/keys/password is on no volume"),
    "model": ("h100", SETTINGS, "data REFINERY_MODEL", "/model/refined", "is on no volume"),
    "device": ("cpu", SETTINGS, "data REFINERY_DEVICE", "cuda", "no GPU and serves from cuda"),
    "no device": ("h100", SETTINGS, "data REFINERY_DEVICE", "auto", "a GPU and serves from auto"),
    "others' GPUs": ("cpu", SERVICE, f"{CONTAINER} env 3", None, "shows those of others"),
    "memory": ("cpu", SETTINGS, "data REFINERY_CACHE_BYTES", "4000000000",
               "than half of its memory"),
    "maxmemory": ("h100", "Deployment/redis", f"{CONTAINER} args 5", "3500mb",
                  "3500mb is too near"),
    "policy": ("cpu", "Deployment/redis", f"{CONTAINER} args 7", "noeviction", "is 'noeviction'"),
    "persistence": ("cpu", "Deployment/redis", f"{CONTAINER} args 1", "60 1", "--save is '60 1'"),
    "option": ("train-job", JOB, f"{CONTAINER} args 8", "--devise=cuda", "unrecognized arguments"),
    "recipe": ("train-job", JOB, f"{CONTAINER} args 3", "--recipe=papers", "refused:"),
    "other program": ("train-job", JOB, f"{CONTAINER} args", ["sleep"],
                      "does not start the trainer"),
    "anew": ("train-job", JOB, f"{CONTAINER} args 7", "--skip-bad-images", "no --resume"),
    "images": ("train-job", JOB, f"{CONTAINER} args 5", "--images=/cache",
               "is no read-only volume"),
    "output": ("train-job", JOB, f"{CONTAINER} args 6", "--output=/runs/a",
               "on no volume that can"),
    "on the CPU": ("train-job", JOB, f"{CONTAINER} args 8", "--device=auto", "trains on auto"),
    "exit code": ("train-job", JOB, "spec podFailurePolicy rules 0 onExitCodes values", [78],
                  "are not those of the trainer"),
    "container": ("train-job", JOB, "spec podFailurePolicy rules 0 onExitCodes containerName", "x",
                  "a container that is not there"),
    "eviction": ("train-job", JOB, "spec podFailurePolicy rules 2", None, "a drained node counts"),
    "two writers": ("train-job", JOB, "spec podReplacementPolicy", "TerminatingOrFailed",
                    "one folder"),
    "restart": ("train-job", JOB, f"{POD} restartPolicy", "OnFailure", "needs restartPolicy Never"),
    "grace": ("train-job", JOB, f"{POD} terminationGracePeriodSeconds", 30,
              "less than five minutes"),
    "torchrun's option": ("train-torchrun", NODE, f"{CONTAINER} args 4", "--grace=240", "refused:"),
    "processes": ("train-torchrun", NODE, f"{CONTAINER} args 2", "--nproc-per-node=4", "on 8 GPUs"),
    "shutdown": ("train-torchrun", NODE, f"{CONTAINER} args 4", "--shutdown-timeout=300",
                 "after 300"),
    "shared memory": ("train-torchrun", NODE, f"{POD} volumes 2 emptyDir medium", None, "64 MiB"),
    "own address": ("train-torchrun", NODE, f"{CONTAINER} args 3", "--max-restarts=0",
                    "other nodes"),
    "script": ("train-torchrun", NODE, f"{CONTAINER} args 6", "service",
               "does not start the trainer"),
    "nodes": ("train-jobset", NODES, f"{NODES_JOB} completions", 3, "3 of 2 nodes"),
    "rank": ("train-jobset", NODES, f"{NODES_JOB} completionMode", None, "have no rank"),
    "first pod": ("train-jobset", NODES, "metadata name", "x", "its first pod is x-node-0-0.x"),
}  # fmt: skip


@pytest.mark.parametrize("overlay", EVERY)
def test_the_programs_accept_what_an_overlay_tells_them(overlay):
    assert findings(documents(overlay)) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_number_or_option_is_found(mistake):
    overlay, name, path, value, sentence = MISTAKES[mistake]
    items = documents(overlay)

    put(items, name, path, value)

    assert sentence in "\n".join(findings(items))


@pytest.mark.parametrize(
    ("text", "number"), [("250m", 0.25), ("3", 3), ("1.5Gi", 1.5 * 2**30), ("2M", 2e6)]
)
def test_a_quantity_is_read(text, number):
    assert quantity(text) == number


@pytest.mark.parametrize("overlay", ["cpu", "h100"])
def test_threads_are_as_many_as_the_cores_that_were_asked_for(overlay):
    (container,) = find(documents(overlay), SERVICE)["spec"]["template"]["spec"]["containers"]

    fields = {
        entry["name"]: entry["valueFrom"]["resourceFieldRef"]["resource"]
        for entry in container["env"]
        if "valueFrom" in entry
    }

    assert fields == dict.fromkeys(
        ("REFINERY_DECODE_THREADS", "REFINERY_TORCH_THREADS", "OMP_NUM_THREADS"), "requests.cpu"
    )


def test_the_service_is_restarted_for_another_reason_than_it_is_left_alone():
    (container,) = find(documents("cpu"), SERVICE)["spec"]["template"]["spec"]["containers"]

    paths = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}

    assert paths == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }


def test_nobody_starts_without_keys():
    (volume,) = (
        one
        for one in find(documents("cpu"), SERVICE)["spec"]["template"]["spec"]["volumes"]
        if one["name"] == "api-keys"
    )

    assert not volume["secret"].get("optional")
