"""Checks of jobs of the trainer: their command lines, and what Kubernetes does when they end."""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence

from torch.distributed.run import get_args_parser

from tests.deploy.manifests import Document, Pod, pods
from trainer.__main__ import EXIT_INTERRUPTED, EXIT_USER_ERROR, _parser, _settings
from trainer.errors import TrainerError
from trainer.recipe_file import load_recipe


def wrong_trainers(items: Sequence[Document]) -> Iterator[str]:
    """The trainer accepts its command line, and what ends is continued or left alone."""
    for pod in pods(items):
        for container in pod.containers:
            if container["name"] == "trainer":
                yield from (f"{pod.name}: {text}" for text in _trainer(pod, container))


def _trainer(pod: Pod, container: Document) -> Iterator[str]:
    words = [_expanded(word, container) for word in container["args"]]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            if words[:3] == ["python", "-m", "trainer"]:
                torchrun, arguments = None, words[3:]
            elif words[0] == "torchrun":
                torchrun = get_args_parser().parse_args(words[1:])
                arguments = torchrun.training_script_args
            else:
                yield "does not start the trainer"
                return
            options = _parser().parse_args(arguments)
            load_recipe(options.recipe, _settings(options))
    except SystemExit:
        yield f"refused: {said.getvalue()}"
        return
    except TrainerError as error:
        yield f"refused: {error}"
        return
    if not options.resume:
        yield "begins anew after each interruption: no --resume"
    mounts = {
        mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]
    }
    if mounts.get(str(options.images)) is not True:
        yield f"{options.images} is no read-only volume"
    if mounts.get("/" + str(options.output).split("/")[1]) is not False:
        yield f"{options.output} is on no volume that can be written to"
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    if torchrun is None:
        if (options.device, gpus) != ("cuda", 1):
            yield f"trains on {options.device} and has {gpus} GPUs"
        yield from _exit_codes(pod)
    else:
        yield from _torchrun(pod, torchrun, gpus)
    job = _job(pod)
    if job["podReplacementPolicy"] != "Failed":
        yield "two trainers may write to one folder"
    if pod.spec["restartPolicy"] != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if not any(
        rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]
        for rule in job["podFailurePolicy"]["rules"]
    ):
        yield "a drained node counts as a failure"
    if pod.spec["terminationGracePeriodSeconds"] < 300:
        yield "has less than five minutes for a checkpoint"


def _torchrun(pod: Pod, options: argparse.Namespace, gpus: int) -> Iterator[str]:
    if (options.module, options.training_script) != (True, "trainer"):
        yield "torchrun does not start the trainer"
    if int(options.nproc_per_node) != gpus:
        yield f"{options.nproc_per_node} processes on {gpus} GPUs"
    if not 30 < options.shutdown_timeout < pod.spec["terminationGracePeriodSeconds"]:
        yield f"torchrun kills trainers after {options.shutdown_timeout} s"
    if not any(volume.get("emptyDir", {}).get("medium") for volume in pod.spec["volumes"]):
        yield "NCCL has 64 MiB of shared memory"
    if pod.owner["kind"] != "JobSet":
        if not options.standalone or options.local_addr != "127.0.0.1":
            yield "looks for other nodes"
        return
    job, name = _job(pod), pod.owner["metadata"]["name"]
    if not int(options.nnodes) == job["completions"] == job["parallelism"]:
        yield f"{job['completions']} of {options.nnodes} nodes"
    if job.get("completionMode") != "Indexed":
        yield "its pods have no rank"
    first = f"{name}-{pod.owner['spec']['replicatedJobs'][0]['name']}-0-0.{name}"
    if options.master_addr != first:
        yield f"its first pod is {first}, and the others look for {options.master_addr}"


def _exit_codes(pod: Pod) -> Iterator[str]:
    actions = {
        code: rule["action"]
        for rule in _job(pod)["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    if actions != {EXIT_USER_ERROR: "FailJob", EXIT_INTERRUPTED: "Ignore"}:
        yield f"exit codes {actions} are not those of the trainer"
    names = {container["name"] for container in pod.containers}
    for rule in _job(pod)["podFailurePolicy"]["rules"]:
        if rule.get("onExitCodes", {}).get("containerName", "trainer") not in names:
            yield "a rule for a container that is not there"


def _job(pod: Pod) -> Document:
    if pod.owner["kind"] == "JobSet":
        return dict(pod.owner["spec"]["replicatedJobs"][0]["template"]["spec"])
    return dict(pod.owner["spec"])


def _expanded(word: str, container: Document) -> str:
    """As Kubernetes replaces `$(NAME)`; a value that only the cluster knows is 0."""
    variables = {entry["name"]: entry.get("value", "0") for entry in container.get("env", [])}
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word)
