"""What the README shows is run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.support import ROOT, running_server

README = (ROOT / "README.md").read_text()
FLAGS = re.MULTILINE | re.DOTALL
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=FLAGS)
SERVER = "http://127.0.0.1:8000"


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def shown_output(code):
    """The text block right after a code block."""
    index = next(i for i, (_, text) in enumerate(BLOCKS) if text == code)
    kind, text = BLOCKS[index + 1]
    assert kind == "text", "every Python block is followed by its output"
    return text


@pytest.fixture
def checkout(tmp_path):
    """A working folder that looks like the repository and can be written to."""
    for name in ("examples", "models", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, "--model", str(ROOT / "models" / "demo")) as url:
        yield url


def run_python(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_commands_are_make_targets():
    for target in ("serve", "test"):
        assert f"    make {target} " in README
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_prints_what_is_shown(code, checkout, server):
    assert run_python(code.replace(SERVER, server), checkout) == shown_output(code)


def test_the_kernels_example_prints_what_is_shown(checkout):
    text = (ROOT / "docs" / "kernels.md").read_text()
    code, output = re.search(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```$", text, FLAGS).groups()

    assert run_python(code, checkout) == output


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: not run")
@pytest.mark.parametrize("command", [text for text in blocks("sh") if "curl" in text])
def test_curl_lines_get_an_answer(command, checkout, server):
    done = subprocess.run(
        ["bash", "-c", command.replace(SERVER, server)],
        cwd=checkout,
        check=True,
        capture_output=True,
    )

    if "README.md" in command:
        assert b'"code"' in done.stdout
    elif "boxes" in command:
        assert load_file(checkout / "boxes.safetensors")["features.0"].shape == (2, 7, 7, 192)
    else:
        assert load_file(checkout / "cat.safetensors")["features.0"].shape == (19, 28, 192)


@pytest.mark.slow
def test_refining_what_ships_runs(checkout):
    (command,) = [text for text in blocks("sh") if "--recipe demo" in text]
    words = shlex.split(command)
    assert words[:3] == [".venv/bin/python", "-m", "trainer"]

    # two steps here; the number of steps is the only thing changed
    subprocess.run(
        [sys.executable, *words[1:], "--set", "run.max_steps=2"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )

    assert (checkout / "runs" / "demo" / "refined" / "model.safetensors").is_file()


def test_the_adapter_that_ships_gives_the_artifact_that_ships_again(checkout):
    (command,) = [text for text in blocks("sh") if "trainer.merge" in text]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "trainer.merge"]

    subprocess.run(
        [sys.executable, *words[1:]],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )

    merged, shipped = checkout / "refined-demo", ROOT / "models" / "demo"
    name = "model.safetensors"
    assert (merged / name).read_bytes() == (shipped / name).read_bytes()


@pytest.mark.parametrize(
    "command",
    [line for text in blocks("sh") for line in text.splitlines() if line.startswith("python -m t")],
)
def test_commands_of_the_trainer_take_the_flags_that_are_shown(command):
    module, *words = shlex.split(command, comments=True)[2:]
    subcommand = [word for word in words[:1] if not word.startswith("-")]
    shown = subprocess.run(
        [sys.executable, "-m", module, *subcommand, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for word in words:
        if word.startswith("--"):
            assert word in shown, word


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]

    assert local
    for link in local:
        assert (ROOT / link).exists(), link


MEASURED = {
    "CamVid, mIoU (%)": ("camvid", "mIoU"),
    "CamVid, pixel accuracy (%)": ("camvid", "pixel accuracy"),
    "VOC subset, mIoU (%)": ("voc2012_subset", "mIoU"),
    "7-Scenes, RMSE (m, lower is better)": ("7scenes_redkitchen", "RMSE"),
    "tokens with spurious patterns (%, lower is better)": ("photographs", "FP or GP"),
    "tokens found again in a shifted view (%)": ("photographs", "view retrieval (shift)"),
    "tokens found again in a zoomed view (%)": ("photographs", "view retrieval (zoom)"),
}


def recorded(dataset, name):
    """Raw's and refined's mean and the difference's mean and interval, from the artifact."""
    manifest = json.loads((ROOT / "models" / "demo" / "refinery.json").read_text())
    (result,) = [one for one in manifest["evaluations"] if one["dataset"] == dataset]
    rows = {row["subject"]: row["scores"] for row in result["rows"]}

    def interval(subject):
        return next(one["interval"] for one in rows[subject] if one["name"] == name)

    change = interval("refined minus raw")
    means = [interval("raw")["mean"], interval("refined")["mean"]]
    return [*means, change["mean"], change["low"], change["high"]]


@pytest.mark.parametrize(("label", "dataset", "name"), [(k, *v) for k, v in MEASURED.items()])
def test_numbers_of_the_model_that_ships_are_those_it_carries(label, dataset, name):
    numbers = recorded(dataset, name)

    row = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.MULTILINE)
    shown = re.findall(r"[-+]?\d+\.\d+", row.group(1))
    for text, number in zip(shown, numbers, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(number, abs=0.51 * 10**-digits)
    change = "{} [{}, {}]".format(*re.findall(r"[-+]\d+\.\d+", row.group(1)))
    assert change in (ROOT / "docs" / "results.md").read_text()
