"""The command line: python -m trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backbone import Backbone, load_artifact
from kernels import dispatch
from tests.trainer.refining import SMALL, image_folder, model_folder
from trainer.__main__ import main
from trainer.merge import main as merge

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restore_logging_and_warnings():
    """`main` sets up the process's logging; a test process goes on after it."""
    import logging
    import warnings

    root, levels = logging.getLogger(), {}
    handlers, level = root.handlers[:], root.level
    for name in ("trainer", "backbone"):
        levels[name] = logging.getLogger(name).level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def command(tmp_path, *more, settings=()):
    if not (tmp_path / "images").exists():
        image_folder(tmp_path / "images")
        model_folder(tmp_path / "model")
    arguments = ["--images", tmp_path / "images", "--output", tmp_path / "out"]
    arguments += ["--backbone", tmp_path / "model", "--device", "cpu"]
    for setting in (*SMALL, *settings):
        arguments += ["--set", setting]
    return [str(argument) for argument in (*arguments, *more)]


def test_a_run_ends_with_an_artifact_and_a_summary(tmp_path, capsys):
    code = main(command(tmp_path, settings=["run.max_steps=2"]))

    assert code == 0
    assert load_artifact(tmp_path / "out" / "refined").manifest.patch_size == 16
    shown = capsys.readouterr().out
    assert "python -m service --model" in shown
    assert "2 in " in shown


def test_random_weights_are_used_when_asked_for_by_name(tmp_path, capsys):
    model = ["--backbone", "vit_tiny_patch16_224"]
    settings = ["run.max_steps=1", "data.batch_size=1", "data.size=32", "loss.lambda_spu=0"]

    without = main(command(tmp_path, *model, settings=settings))
    message = capsys.readouterr().err
    code = main(command(tmp_path, *model, "--random-weights", settings=settings))
    again = main(command(tmp_path, *model, "--random-weights", "--resume", settings=settings))

    assert without == 2
    assert "--random-weights" in message
    assert (code, again) == (0, 0)
    card = (tmp_path / "out" / "refined" / "README.md").read_text()
    assert "random weights`; licence: not stated" in card


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "papr"], "no recipe is called 'papr'; there are demo, paper, release"),
        (["--set", "loss.temprature=1"], "the nearest valid key is loss.temperature"),
        (["--images", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["--backbone", "vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
        (["--device", "tpu"], "no device is called 'tpu'"),
        (["--device", "mps"], "device mps is not supported"),
        (["--device", "cuda:99"], "device cuda:99 is not here"),
        (["--set", "data.size=60"], "not a whole number of 16 px patches; resize to 64x64"),
        (["--set", "data.size=16"], "set data.size higher"),
        (["--set", "crops.strip_share=1", "--set", "data.size=48"], "reference strip beside"),
        (["--set", "filters.attention_hijack.layers=[7, 8]"], "layers 7..8, but the backbone's"),
        (["--weights", "/no/weights.pt"], "/no/weights.pt"),
    ],
)
def test_a_mistake_is_named_in_one_message_without_a_traceback(tmp_path, capsys, more, message):
    code = main(command(tmp_path, *more))

    shown = capsys.readouterr().err
    assert code == 2
    assert message in shown.replace("\n", " ")
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "refined").exists()


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_of_several_processes_one_tells_a_mistake(tmp_path, capsys, monkeypatch, rank, speaks):
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)

    assert main(command(tmp_path, settings=["loss.temprature=1"])) == 2
    assert ("loss.temperature" in capsys.readouterr().err) == speaks


@pytest.mark.parametrize("name", ["recipes", "doctor"])
def test_commands_beside_the_run_have_a_help_of_their_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])

    assert ended.value.code == 0
    assert f"python -m trainer {name}" in capsys.readouterr().out


def test_images_and_output_are_needed(capsys):
    with pytest.raises(SystemExit):
        main([])

    assert "--images and --output are needed" in capsys.readouterr().err


def test_the_recipe_can_be_printed_without_images(capsys):
    code = main(["--recipe", "release", "--set", "lora.rank=4", "--print-recipe"])

    recipe = json.loads(capsys.readouterr().out)
    assert code == 0
    assert recipe["lora"]["rank"] == 4
    assert recipe["registers"]["fill"] == "zeros"


def test_help_names_the_recipes_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])

    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "paper", "siglip2-so400m", "recipes", "doctor"))
    assert "75" in shown


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_writes_a_checkpoint_and_exits_with_75(tmp_path):
    settings = ["data.epochs=1000", "run.checkpoint_every=1000", "run.log_every=1"]
    metrics = tmp_path / "out" / "metrics.jsonl"
    process = start(command(tmp_path, settings=settings))
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)

    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)

    assert process.returncode == 75
    assert "--resume" in shown
    assert "Traceback" not in shown
    from trainer.checkpoint import load_checkpoint

    steps = metrics.read_text().count("\n")
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt").step == steps >= 3
    assert not (tmp_path / "out" / "refined").exists()


def test_a_stopped_run_goes_on_with_resume(tmp_path, monkeypatch):
    import trainer.loop

    original = trainer.loop.Loop._step

    def step_and_terminate(self, stream):
        values = original(self, stream)
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return values

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop.Loop, "_step", step_and_terminate)
        stopped = main(command(tmp_path))
    code = main(command(tmp_path, "--resume"))

    assert (stopped, code) == (75, 0)
    assert signal.getsignal(signal.SIGTERM) == before
    records = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    load_artifact(tmp_path / "out" / "refined")


def test_a_mistyped_kernel_mode_is_told_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "fast")
    dispatch.mode.cache_clear()
    try:
        code = main(command(tmp_path))
    finally:
        dispatch.mode.cache_clear()

    assert code == 2
    assert "REFINERY_KERNELS is 'fast'; use one of auto" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_may_be_held_in_bfloat16_and_the_adapter_gives_the_same_artifact(tmp_path):
    settings = ["run.max_steps=2", "run.precision=bf16", "backbone.dtype=bfloat16"]
    settings += ["run.weights_dtype=bfloat16", "run.gradient_checkpointing=true"]

    assert main(command(tmp_path, settings=settings)) == 0

    refined, again = tmp_path / "out" / "refined", tmp_path / "again"
    weights = load_file(refined / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    raw = load_artifact(refined).backbone.vit.blocks[0].attn.qkv.weight
    base = Backbone.load(tmp_path / "model").vit.blocks[0].attn.qkv.weight
    assert not torch.equal(raw, base.to(raw.dtype)), "nothing was merged"
    words = ["--backbone", tmp_path / "model", "--adapter", refined / "adapter", "--output", again]
    assert merge([str(word) for word in words]) == 0
    name = "model.safetensors"
    assert (again / name).read_bytes() == (refined / name).read_bytes()


def test_weights_in_bfloat16_need_a_run_in_bfloat16(tmp_path, capsys):
    settings = ["run.precision=fp32", "backbone.dtype=bfloat16"]

    assert main(command(tmp_path, settings=settings)) == 2

    assert "set backbone.dtype=float32" in capsys.readouterr().err.replace("\n", " ")
