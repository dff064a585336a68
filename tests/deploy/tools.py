"""The programs that check the deployment files; a test that needs a missing one is skipped."""

import shutil
from pathlib import Path

import pytest

from tests.support import ROOT

BIN = ROOT / "build" / "deploy-tools" / "bin"


def tool(name: str, folder: Path = BIN) -> str:
    """The path of a tool that `requirements-deploy.lock` pins."""
    path = shutil.which(name, path=folder)
    if path is None:
        pytest.skip(f"no {name} in build/deploy-tools: `make test` installs it")
    return path


def program(name: str, folder: Path = BIN) -> str:
    """The path of a program: the pinned one where there is one (kubectl), else that on PATH."""
    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on PATH: .ci/run says how it is installed")
    return path
