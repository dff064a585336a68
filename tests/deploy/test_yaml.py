"""Every YAML file keeps to .yamllint.yaml."""

import subprocess

from tests.deploy.tools import tool
from tests.support import ROOT


def yaml_files():
    """Those of the repository, new ones too; no file that git ignores."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard", "*.yaml", "*.yml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # A file that was removed and not yet committed is still listed.
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def findings(*files):
    """What yamllint says against `files`: nothing where it finds nothing, not even a warning."""
    command = [tool("yamllint"), "--strict", "--format", "parsable", *map(str, files)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 or run.stdout, run.stderr
    return run.stdout


def test_every_yaml_file_is_clean():
    files = yaml_files()

    assert ".yamllint.yaml" in files
    assert findings(*files) == ""


def test_a_key_that_is_there_twice_is_found(tmp_path):
    twice = tmp_path / "twice.yaml"
    twice.write_text("replicas: 1\nreplicas: 2\n")

    assert 'duplication of key "replicas"' in findings(twice)


def test_a_word_that_is_a_truth_value_to_some_readers_is_found(tmp_path):
    truthy = tmp_path / "truthy.yaml"
    truthy.write_text("enabled: yes\n")

    assert "truthy value should be one of [false, true]" in findings(truthy)


def test_a_warning_is_a_finding(tmp_path):
    near = tmp_path / "near.yaml"
    near.write_text("name: service #not a comment to every reader\n")

    assert "missing starting space in comment" in findings(near)
