"""Several processes take the step that one takes with all the images."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from backbone import read_manifest
from tests.support import tiny_backbone
from tests.trainer.processes import in_processes
from tests.trainer.refining import (
    SMALL,
    image_folder,
    model_folder,
    random_images,
    small_recipe,
    small_refiner,
)
from trainer.checkpoint import load_checkpoint
from trainer.distributed import ALONE, PeerError, Ranks, choose_device
from trainer.errors import CheckpointError, DataError, TrainerError
from trainer.loop import Interrupted, Loop, StopRequest
from trainer.record import read_metrics
from trainer.run import refine

ROOT = Path(__file__).parents[2]

# Every part of a step has work to do, and images differ in how many of their tokens are clean.
BUSY = [
    "filters.fp_gp.criterion=zscore",
    "filters.fp_gp.threshold=1.0",
    "filters.register_guided.threshold=0.3",
    "filters.attention_hijack.layers=[0, 1]",
    "loss.lambda_con=0.4",
    "loss.uniformity=0.5",
    "loss.affinity_floor=0.2",
    "loss.lambda_spu=0.5",
    "registers.r_reg=2",
    "lora.dropout=0",
]
REJECTS_ALL = ["filters.fp_gp.criterion=cosine", "filters.fp_gp.threshold=-1"]


def step(ranks, settings):
    """Terms and gradients of one step on this rank's part of four images."""
    recipe = small_recipe(*BUSY, *settings)
    backbone = tiny_backbone().double()
    with torch.no_grad():
        for block in backbone.vit.blocks:
            block.attn.qkv.weight.mul_(20)  # else attention is all but uniform
    refiner = small_refiner(recipe, backbone=backbone).double()
    backbone.vit.patch_embed.register_forward_pre_hook(lambda _module, inputs: inputs[0].double())
    refiner.ranks = ranks
    images = random_images(4)
    images[0] //= 8  # a dull one
    images = images[ranks.part(4)]
    generator = torch.Generator().manual_seed(0)
    draws = refiner.draw(len(images), progress=0.5, generator=generator)
    output = refiner(images, draws)
    output.loss.backward()
    trained = {n: p for n, p in refiner.named_parameters() if p.requires_grad}
    ranks.average_gradients(list(trained.values()))
    terms = {name: ranks.mean(term) for name, term in output.terms.items()}
    return terms, {n: p.grad for n, p in trained.items()}, generator.get_state()


def steps(ranks, settings):
    return [step(ranks, more) for more in settings]


def errors(ranks):
    """What each rank hears of errors that one or several of them meet."""
    heard = []
    for failing in ([1], [0, 1], [0]):
        try:
            with ranks.agreed():
                if ranks.rank in failing:
                    raise DataError(f"process {ranks.rank} cannot read")
        except (DataError, PeerError) as error:
            heard.append(repr(error))
    try:
        ranks.from_first(lambda: 1 / 0)
    except (ZeroDivisionError, PeerError) as error:
        heard.append(type(error).__name__)
    return heard


def part_of_a_run(ranks, folder, stop_after):
    """A run in `folder` by all ranks, which one of them is asked to stop."""
    original = Loop._step

    def step_then_stop(loop, stream):
        values = original(loop, stream)
        if loop.progress.step == stop_after and ranks.rank == ranks.size - 1:
            stop.signum = signal.SIGTERM
        return values

    stop = StopRequest()
    Loop._step = step_then_stop
    try:
        run_alone(folder, batch=4 // ranks.size, ranks=ranks, stop=stop)
    except Interrupted as interrupted:
        return interrupted.signum, interrupted.step
    finally:
        Loop._step = original
    return None


def run_to_its_end(ranks, folder):
    """A run of one step by all ranks, measured by the first; how many results are in it then."""
    settings = ["run.max_steps=1", "run.measure_images=2"]
    artifact = run_alone(folder, *settings, batch=2, output="measured", ranks=ranks).artifact
    return len(read_manifest(artifact).evaluations) if ranks.is_first else None


def run_alone(folder, *settings, batch, output="out", **changes):
    recipe = small_recipe(
        f"backbone.name={folder / 'model'}",
        f"data.batch_size={batch}",
        "data.epochs=2",
        "optim.schedule=cosine",
        "lora.dropout=0",
        *settings,
    )
    changes = {"stop": StopRequest(), "console": Console(quiet=True)} | changes
    device = torch.device("cpu")
    return refine(recipe, folder / "images", folder / output, device=device, **changes)


def in_two(ranks, folder):
    """Everything that two processes are asked, so that they start once."""
    stopped = part_of_a_run(ranks, folder, stop_after=2)
    return steps(ranks, SETTINGS), errors(ranks), stopped, run_to_its_end(ranks, folder)


SETTINGS = [[], REJECTS_ALL, ["loss.matched=false", "filters.attention_hijack.variant=release"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    image_folder(folder / "images", count=12)
    model_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return in_processes(folder, 2, in_two, folder)


def assert_same_steps(ranks):
    alone = steps(ALONE, SETTINGS)
    shares = alone[0][0]
    assert 0 < shares["clean"] < 0.9
    assert 0 < shares["clean_attention_hijack"] < 1
    assert alone[1][0]["clean"] == 0
    for own in ranks:
        for (terms, gradients, state), (all_terms, all_gradients, whole) in zip(
            own, alone, strict=True
        ):
            assert torch.equal(state, whole)
            torch.testing.assert_close(terms, all_terms, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(gradients, all_gradients, rtol=1e-6, atol=1e-9)


def test_terms_and_gradients_are_those_of_one_process_with_all_images(two):
    assert_same_steps([own for own, *_ in two])


@pytest.mark.slow
def test_four_processes_take_the_same_step_too(tmp_path):
    assert_same_steps(in_processes(tmp_path, 4, steps, SETTINGS))


def test_an_error_in_one_process_ends_all_and_one_tells(two):
    (_, first, *_), (_, second, *_) = two

    assert first == [
        "PeerError('process 1 says why')",
        "DataError('process 0 cannot read')",
        "DataError('process 0 cannot read')",
        "ZeroDivisionError",
    ]
    assert second == [
        "DataError('process 1 cannot read')",
        "PeerError('process 0 says why')",
        "PeerError('process 0 says why')",
        "PeerError",
    ]


def test_a_stop_of_one_process_stops_all_and_another_number_of_them_goes_on(folder, two):
    stopped = [heard for _, _, heard, _ in two]
    written = load_checkpoint(folder / "out" / "checkpoint.pt")

    with pytest.raises(CheckpointError, match="set data.batch_size to 1 or 2 or 4"):
        run_alone(folder, batch=3, resume=True)
    run_alone(folder, batch=4, resume=True)
    run_alone(folder, batch=4, output="whole")

    assert stopped == [(signal.SIGTERM, 2)] * 2
    assert (written.step, written.position, written.global_batch) == (2, 8, 4)
    cut, whole = read_metrics(folder / "out"), read_metrics(folder / "whole")
    assert [record["step"] for record in cut] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(cut, whole, strict=True):
        for name in ("loss", "absorption", "clean", "sparsity", "lr", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    adapters = [load_checkpoint(folder / o / "checkpoint.pt").parameters for o in ("out", "whole")]
    # AdamW divides by the root of tiny second moments, which magnifies what rounding changes.
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-5)


def test_one_process_measures_the_artifact_and_the_others_do_not_wait(two):
    assert [found for *_, found in two] == [1, None]


@pytest.mark.slow
def test_torchrun_forwards_sigterm_and_one_process_writes(folder):
    output = folder / "torchrun"
    settings = [*SMALL, "data.epochs=1000", "run.checkpoint_every=1000", "run.log_every=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc-per-node=2", "-m", "trainer", "--device", "cpu"]
    command += ["--images", folder / "images", "--backbone", folder / "model", "--output", output]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)

    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)

    assert process.returncode == 1  # whatever its processes return
    assert shown.count("continue with the same command and --resume") == 1
    written = load_checkpoint(output / "checkpoint.pt")
    assert written.step == metrics.read_text().count("\n") >= 3
    assert written.global_batch == 4


@pytest.mark.parametrize(
    ("environment", "name", "message"),
    [
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE='two' is not a number"),
        ({}, "cuda:0,cuda:1", "2 devices, and one process trains on one; start torchrun"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            "cuda:0,cuda:1",
            "4 processes were started on this machine, and --device cuda:0,cuda:1 has 2",
        ),
    ],
)
def test_devices_and_processes_that_do_not_go_together(environment, name, message, monkeypatch):
    monkeypatch.setattr("trainer.distributed.find_devices", lambda name: name.split(","))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)

    with pytest.raises(TrainerError, match=message):
        choose_device(name)


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(
        "trainer.distributed.find_devices", lambda _name: ["cuda:0", "cuda:1", "cuda:2"]
    )
    alone = choose_device("auto")
    for variable, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)

    assert alone == torch.device("cuda:0")
    assert choose_device("cuda") == torch.device("cuda:1")


def test_memory_that_ends_in_a_collective_is_not_another_processs_end(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.distributed.all_reduce", full)

    with pytest.raises(torch.OutOfMemoryError):
        Ranks(1, 2).sum(torch.ones(2))
