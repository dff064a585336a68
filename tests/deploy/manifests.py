"""The rendered overlays of k8s/, and how tests find their way in them."""

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.deploy.tools import program
from tests.support import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("cpu", "h100", "loader", "train-job", "train-torchrun", "train-jobset")
SITE = tuple(f"example-site/{name}" for name in ("service", "loader", "train"))
# That of the site, with every line of it that is a comment for whoever needs it.
OPTIONS = "example-site/service with options"
# Components that a reader of k8s/README.md adds to h100.
REDIS_PASSWORD, MODEL_IMAGE = "h100 with redis-password", "h100 with model-image"
ADDED = (REDIS_PASSWORD, MODEL_IMAGE)
EVERY = (*OVERLAYS, *SITE, OPTIONS, *ADDED)

Document = dict[str, Any]


class Pod(NamedTuple):
    """A pod template and who makes pods of it."""

    owner: Document
    labels: dict[str, str]
    spec: Document

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    command = [program("kubectl"), "kustomize", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # It renders what it deprecates, and says so: here that is a mistake.
    assert run.stderr == ""
    return run.stdout


def outside(text: str, *, beside: str = "overlays/h100") -> str:
    """What a kustomization.yaml makes elsewhere, whose paths are as in a folder of k8s/."""
    with tempfile.TemporaryDirectory() as scratch:
        # kustomize takes no absolute path, and follows links.
        folder = Path(scratch).resolve()
        for path in set(re.findall(r"(?m)^ *- (\.\./\S+)$", text)):
            moved = os.path.relpath((K8S / beside / path).resolve(), folder)
            text = re.sub(rf"(?m)^( *- ){re.escape(path)}$", rf"\g<1>{moved}", text)
        (folder / "kustomization.yaml").write_text(text)
        return kustomize(folder)


def added(overlay: str, *components: str) -> str:
    """An overlay with components that somebody adds in a kustomization.yaml of his own."""
    listed = {
        "resources": [f"../../overlays/{overlay}"],
        "components": [f"../../components/{name}" for name in components],
    }
    return outside(yaml.safe_dump(listed))


def with_options(text: str) -> str:
    """A kustomization.yaml with the entries that stand in it as comments."""
    return re.sub(r"(?m)^  # (?=- |  )", "  ", text)


@functools.cache
def rendered(name: str) -> str:
    """An overlay, or another folder of k8s/, as it is applied."""
    if name == OPTIONS:
        folder = SITE[0]
        text = (K8S / folder / "kustomization.yaml").read_text()
        return outside(with_options(text), beside=folder)
    overlay, _, component = name.partition(" with ")
    if component:
        return added(overlay, component)
    return kustomize(K8S / "overlays" / name if name in OVERLAYS else K8S / name)


def parse(text: str) -> list[Document]:
    return [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]


def own_documents(name: str) -> list[Document]:
    """What `kubectl apply -k` of the overlay makes."""
    return parse(rendered(name))


def documents(name: str) -> list[Document]:
    """An overlay with what is applied before it: a fresh copy, for the caller to change."""
    return [*own_documents(needed(name)), *own_documents(name)]


def needed(name: str) -> str:
    """What is applied before an overlay, which refers to what is in there."""
    if name.startswith("example-site"):
        return "example-site/volumes"
    return "namespace" if name == "cpu" else "volumes"


def of_kind(items: Sequence[Document], *kinds: str) -> list[Document]:
    return [item for item in items if item["kind"] in kinds]


def find(items: Sequence[Document], name: str) -> Document:
    """`Kind/name`; a generated name without its hash."""
    kind, _, wanted = name.partition("/")
    for item in of_kind(items, kind):
        if re.fullmatch(re.escape(wanted) + r"(-[a-z0-9]{10})?", item["metadata"]["name"]):
            return item
    raise KeyError(name)


def put(items: Sequence[Document], name: str, path: str, value: Any) -> None:
    """Change a field: keys and indices of `path` are separated by blanks; None takes it out."""
    place: Any = find(items, name)
    *keys, last = (int(key) if key.isdigit() else key for key in path.split())
    for key in keys:
        place = place[key]
    if value is None:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value


def pods(items: Sequence[Document]) -> Iterator[Pod]:
    """Every pod template, those inside a JobSet too."""
    for item in items:
        spec = item.get("spec") or {}
        if item["kind"] == "JobSet":
            templates = [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
        elif item["kind"] == "Pod":
            templates = [item]
        else:
            templates = [spec["template"]] if "template" in spec else []
        for template in templates:
            yield Pod(item, template["metadata"]["labels"], template["spec"])


def plain_jobs(items: Sequence[Document]) -> list[Document]:
    """The Jobs that JobSets become, for tools that know Jobs alone."""
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": f"{item['metadata']['name']}-{job['name']}-0",
                "namespace": item["metadata"]["namespace"],
            },
            "spec": job["template"]["spec"],
        }
        for item in of_kind(items, "JobSet")
        for job in item["spec"]["replicatedJobs"]
    ]


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    powers = {None: 1, "m": 1e-3} | {unit: 1000.0**n for n, unit in enumerate("kMGT", 1)}
    powers |= {f"{unit}i": 1024.0**n for n, unit in enumerate("KMGT", 1)}
    return float(match[1]) * powers[match[2]]
