"""The Dockerfile and what it is built from, without an engine."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.deploy.tools import tool
from tests.support import ROOT

DOCKERFILES = (
    "docker/Dockerfile",
    "docker/model.Dockerfile",
    "tests/deploy/engine/images/Dockerfile",
)
# Why each check is left out:
CHECKOV_SKIPS = (
    "CKV_DOCKER_7",  # wants a tag on FROM base AS ..., which is a stage
)
HEAVY = re.compile(r"(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)")


def hadolint(*files: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("hadolint"), *files], cwd=folder, capture_output=True, text=True, check=False
    )


def checkov(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("checkov"), "--file", str(file), "--framework", "dockerfile", "--compact", "--quiet",
         "--skip-download", "--skip-check", ",".join(CHECKOV_SKIPS)],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def pins(text: str) -> dict[tuple[str, str], list[str]]:
    """Hashes of each (name==version, marker) of a lock file."""
    entries = re.split(r"^(?=[a-z])", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]
    found = {}
    for entry in entries:
        requirement, *hashes = re.split(r"\s+--hash=", entry.strip())
        found[requirement.split(" ")[0], requirement] = sorted(hashes)
    return found


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_has_nothing_to_say(file):
    assert (answer := hadolint(file)).returncode == 0, answer.stdout


def test_hadolint_sees_a_shell_form_command(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCMD python -m service\n")

    assert "DL3025" in hadolint("Dockerfile", folder=tmp_path).stdout


@pytest.mark.parametrize("file", DOCKERFILES[:1])
def test_checkov_has_nothing_to_say(file):
    assert (answer := checkov(ROOT / file)).returncode == 0, answer.stdout


def test_checkov_sees_a_container_of_root_s(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian:12\nUSER root\nCMD ['x']\n")

    assert "CKV_DOCKER_8" in checkov(tmp_path / "Dockerfile").stdout


def test_the_locks_of_the_images_are_part_of_the_project_s_lock():
    project = pins((ROOT / "requirements.lock").read_text())
    torch, rest = (
        pins((ROOT / "docker" / name).read_text()) for name in ("torch.lock", "rest.lock")
    )

    assert not torch.keys() & rest.keys()
    names = {name for name, _ in project}
    for (name, marker), hashes in (torch | rest).items():
        assert name in names, f"{name} is not what requirements.lock has: make lock"
        same = [other for (known, _), other in project.items() if known == name]
        assert hashes in same, (name, marker)
        assert hashes, name
    assert {"torch", "torchvision", "triton"} <= {name.split("==")[0] for name, _ in torch}
    assert all(HEAVY.fullmatch(name.split("==")[0]) for name, _ in torch)
    assert not any(HEAVY.fullmatch(name.split("==")[0]) for name, _ in rest)


def test_a_lock_is_read_entry_by_entry():
    text = (
        "a==1 ; x \\\n    --hash=sha256:2 \\\n    --hash=sha256:1\nb==2 \\\n    --hash=sha256:3\n"
    )

    assert pins(text) == {
        ("a==1", "a==1 ; x"): ["sha256:1", "sha256:2"],
        ("b==2", "b==2"): ["sha256:3"],
    }


def test_what_the_project_needs_is_in_the_images():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.match(r"[a-z0-9-]+", line.lower()).group()  # type: ignore[union-attr]
        for line in [*project["dependencies"], *extras["otel"], *extras["tensorboard"]]
    }
    locked = "".join((ROOT / "docker" / name).read_text() for name in ("torch.lock", "rest.lock"))
    present = {line.split("==")[0] for line in locked.splitlines() if re.match(r"[a-z]", line)}

    assert wanted <= present
    assert not present & {"pytest", "ruff", "mypy", "litserve", "schemathesis"}


def test_nothing_but_what_is_listed_can_slip_into_an_image():
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= {word for word in line.split()[1:-1] if not word.startswith("--")}
        copied |= set(re.findall(r"--mount=type=bind,source=([^,]+)", line))
    # Of models/ only what is listed below it.
    copied = (copied - {"models"}) | {"models/demo", "models/demo-pretrained"}
    assert allowed == copied


def test_only_what_docker_20_10_takes_is_used():
    text = (ROOT / "docker" / "Dockerfile").read_text()

    assert not re.search(r"^# *syntax=|<<-?['\"]?EOF|--link|--start-interval", text, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["/usr/bin/tini", "--"\]$', text, re.MULTILINE)
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)


def test_images_have_the_project_s_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    tags = re.findall(r":-vit-refinery-\w+:([^}]+)\}", (ROOT / "compose.yaml").read_text())

    assert set(re.findall(r"^ARG VERSION=(.+)$", dockerfile, re.M)) == {version}
    assert set(tags) == {version}


def test_images_from_elsewhere_are_pinned_by_digest_and_the_same_in_both_files():
    base = re.search(r"^ARG PYTHON_IMAGE=(.+)$", (ROOT / "docker/Dockerfile").read_text(), re.M)
    images = re.findall(r"_IMAGE:-([^}]+)\}", (ROOT / "compose.yaml").read_text())

    assert base is not None
    assert base[1] in images
    for image in images:
        name = re.fullmatch(r"[a-z/-]+:[a-z0-9.-]+(@sha256:[0-9a-f]{64})?", image)
        assert name, image
        assert name[1] or image.startswith("vit-refinery-"), f"{image} has no digest"
