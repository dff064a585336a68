"""Images, containers and Compose projects of the tests, all removed at their end."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import ROOT

# As Kubernetes and compose.yaml run it. Nothing may be written but what is mounted.
HARDENED = (
    "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--tmpfs", "/tmp", "--tmpfs", "/cache:exec,uid=10001,gid=10001",
)  # fmt: skip
PHOTOGRAPH = (ROOT / "examples" / "photographs" / "cat.jpg").read_bytes()


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def docker(*arguments: str, check: bool = True, timeout: float = 120) -> str:
    """Output of a docker command, standard error included."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stdout}"
    return done.stdout.strip()


def inspect(name: str) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return description


def build(target: str, tag: str, *, folder: Path = ROOT) -> str:
    """Build an image of docker/Dockerfile; returns what the build printed."""
    base = os.environ.get("VIT_REFINERY_PYTHON_IMAGE")
    done = subprocess.run(
        ["docker", "build", "--progress=plain", "--file", "docker/Dockerfile", "--target", target,
         "--tag", tag, *(["--build-arg", f"PYTHON_IMAGE={base}"] if base else []), "."],
        cwd=folder,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@contextlib.contextmanager
def container(image: str, *arguments: str, command: tuple[str, ...] = ()) -> Iterator[str]:
    """A running container; yields its id."""
    name = docker("run", "--detach", *arguments, image, *command).splitlines()[-1]
    try:
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def wait_for(condition: Any, what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.3)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def ask(url: str, body: bytes | None = None, **headers: str) -> Answer:
    """An HTTP answer, also one that is an error; status 0 when there is none."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        names.setdefault("Content-Type", "image/jpeg")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, names), timeout=30) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, dict(error.headers), error.read())
    except OSError:
        return Answer(0, {}, b"")


class Project:
    """A Compose project of this repository's files, with ports and volumes of its own.

    Args:
        folder: An empty one.
        variables: In place of those that the caller, or a file .env, has for the project: they may
            name folders that no test should write to. Only images stay as they are.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        # Of its own at each run: `down --volumes` must not meet what somebody else started.
        self.name = f"vit-refinery-test-{secrets.token_hex(4)}"
        self._no_variables = folder / "env"
        self._no_variables.touch()
        self.port = free_port()
        self.variables = {"VIT_REFINERY_PORT": str(self.port)} | variables
        version = subprocess.run(["docker", "compose", "version"], capture_output=True)
        self._compose = (
            ["docker", "compose"] if version.returncode == 0 else [_required("docker-compose")]
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, *arguments: str, fails: bool = False, timeout: float = 900) -> str:
        """Output of a Compose command; of one that must fail, standard error too."""
        done = subprocess.run(
            # With --file, so that no compose.override.yaml is read.
            [*self._compose, "--project-name", self.name, "--env-file", str(self._no_variables),
             "--file", "compose.yaml", *arguments],
            cwd=ROOT,
            env=_without_settings() | {"DOCKER_BUILDKIT": "1"} | self.variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )  # fmt: skip
        text = done.stdout + done.stderr
        assert (done.returncode == 0) != fails, f"{' '.join(arguments)}:\n{text}"
        return (text if fails else done.stdout).strip()

    def container(self, service: str) -> str:
        """Id of the container of a service."""
        return self("ps", "--quiet", service)


def _without_settings() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VIT_REFINERY_") or name.endswith("_IMAGE")
    }


def _required(program: str) -> str:
    path = shutil.which(program)
    assert path, f"neither docker compose nor {program} is here"
    return path
