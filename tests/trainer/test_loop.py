"""The loop around a step: accumulation, resuming, stopping, refusing what is not finite."""

import json
import math

import pytest
import torch
from rich.console import Console

from backbone import Backbone, load_artifact, open_model
from tests.trainer.refining import (
    image_folder,
    model_folder,
    random_images,
    small_recipe,
    small_refiner,
)
from trainer.checkpoint import load_checkpoint
from trainer.data import BadImages, Batch, ImageFolder
from trainer.errors import CheckpointError, DataError, NonFiniteError
from trainer.loop import Identity, Interrupted, Loop, StopRequest, checkpoint_path, count_steps
from trainer.record import read_metrics
from trainer.run import refine

TIMING = {
    "images_per_second",
    "seconds_per_step",
    "memory_gib",
    "data_wait_seconds",
    "loader_rate",
    "loader_over_step",
}


def make_loop(tmp_path, *settings, images=6, refiner=None):
    recipe = small_recipe(*settings)
    folder = ImageFolder.scan(
        image_folder(tmp_path / "images", count=images), seed=0, max_images=None
    )
    (tmp_path / "out").mkdir(exist_ok=True)
    return Loop(
        refiner or small_refiner(recipe, trained=False),
        recipe,
        folder,
        BadImages(skip=False),
        output=tmp_path / "out",
        identity=Identity(recipe={}, data="", weights=""),
    )


def train(loop):
    loop.train(StopRequest(), Console(quiet=True))


def numbers(output):
    """What a run recorded, without what the clock decides."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(output)]


def trained_weights(loop):
    return {n: p.detach().clone() for n, p in loop.refiner.named_parameters() if p.requires_grad}


class StopAfter(StopRequest):
    """A stop request that comes after some steps."""

    def __init__(self, loop, step):
        super().__init__()
        record = loop._step

        def step_then_stop(stream):
            values = record(stream)
            if loop.progress.step == step:
                self.signum = 15
            return values

        loop._step = step_then_stop


@pytest.mark.parametrize(
    ("settings", "images", "steps"),
    [
        (["data.batch_size=4", "data.epochs=2"], 10, 5),
        (["data.batch_size=4", "data.epochs=2", "data.accumulate=2"], 10, 2),
        (["data.batch_size=4", "data.epochs=0.5"], 10, 1),
        (["data.batch_size=16", "data.epochs=1"], 10, 1),
        (["data.batch_size=1", "data.epochs=2", "run.max_steps=7"], 10, 7),
    ],
)
def test_steps_follow_from_epochs_and_batch(settings, images, steps):
    assert count_steps(small_recipe(*settings), images) == steps


def test_accumulated_gradients_are_those_of_the_big_batch():
    """Exact where the loss is a mean over tokens. Statistics over a batch (the sparsity level, the
    attention filter's mean) are of each forward by design; they are switched off here."""
    settings = [
        "filters.fp_gp.enabled=false",
        "filters.register_guided.enabled=false",
        "filters.attention_hijack.enabled=false",
        "loss.uniformity=0",
        "loss.lambda_spu=0",
        "lora.dropout=0",
        "registers.fill=zeros",
        "crops.area=[0.5, 0.5]",
        "crops.aspect=[1.0, 1.0]",
    ]

    def gradients(batches):
        recipe = small_recipe(*settings)
        refiner = small_refiner(recipe)
        draws = refiner.draw(4, progress=0, generator=torch.Generator().manual_seed(0))
        boxes = draws.boxes_BK4
        start = 0
        for images in batches:
            part = type(draws)(
                **{
                    **draws.__dict__,
                    "boxes_BK4": boxes[start : start + len(images)],
                    "candidates_2BKR": draws.candidates_2BKR[:, start : start + len(images)],
                    "detectors_BD": draws.detectors_BD[start : start + len(images)],
                    "border": draws.border[start : start + len(images)],
                }
            )
            (refiner(images, part).loss / len(batches)).backward()
            start += len(images)
        return {n: p.grad for n, p in refiner.named_parameters() if p.requires_grad}

    images = random_images(4)

    big = gradients([images])
    accumulated = gradients(list(images.split(2)))

    for name, gradient in big.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loop_accumulates_before_it_steps(tmp_path):
    def first_step(*settings):
        recipe = small_recipe(*settings, "lora.dropout=0", "optim.clip_norm=0")
        refiner = small_refiner(recipe)
        loop = make_loop(tmp_path, *settings, refiner=refiner)
        gradients = []
        original = refiner.forward

        def forward(images, draws):
            gradients.append([p.grad.clone() for p in loop._trained.values() if p.grad is not None])
            return original(images, draws)

        refiner.forward = forward
        stream = iter([Batch(random_images(2, seed), 2 * seed) for seed in (1, 2, 3)])
        loop._step(stream)
        final = [p.grad.clone() for p in loop._trained.values()]
        return gradients, final, loop.progress

    gradients, final, progress = first_step("data.accumulate=3")

    assert [bool(g) for g in gradients] == [False, True, True]
    assert not any(torch.equal(a, b) for a, b in zip(gradients[1], gradients[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gradients[2], final, strict=True))
    assert (progress.step, progress.position) == (1, 6)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    def norms(clip):
        loop = make_loop(tmp_path, f"optim.clip_norm={clip}")
        values = loop._step(iter([Batch(random_images(), 2)]))
        left = torch.stack([p.grad.norm() for p in loop._trained.values()]).norm().item()
        return values["grad_norm"], left

    (free, free_left), (clipped, clipped_left) = norms(0), norms(0.01)

    assert free == pytest.approx(clipped)
    assert free_left == pytest.approx(free)
    assert clipped_left == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(tmp_path, cut):
    settings = [
        "data.epochs=2",
        "data.accumulate=1",
        "optim.schedule=cosine",
        "optim.warmup=0.3",
        "loss.lambda_con=0.4",
        "loss.consistency_start=0.5",
        "registers.fill=learnable",
    ]
    whole = make_loop(tmp_path / "whole", *settings)
    train(whole)

    first = make_loop(tmp_path / "cut", *settings)
    with pytest.raises(Interrupted) as stopped:
        first.train(StopAfter(first, cut), Console(quiet=True))
    second = make_loop(tmp_path / "cut", *settings)
    second.restore(load_checkpoint(second.checkpoint_path))
    train(second)

    assert stopped.value.step == cut
    assert second.progress.step == whole.num_steps == 6
    assert numbers(tmp_path / "cut" / "out") == numbers(tmp_path / "whole" / "out")
    expected = trained_weights(whole)
    for name, weight in trained_weights(second).items():
        assert torch.equal(weight, expected[name])


def test_steps_after_the_last_checkpoint_are_not_recorded_twice(tmp_path):
    loop = make_loop(tmp_path, "data.epochs=2", "run.checkpoint_every=2")
    killed_after = 3
    step = loop._step

    def step_until_killed(stream):
        if loop.progress.step == killed_after:
            raise KeyboardInterrupt
        return step(stream)

    loop._step = step_until_killed
    with pytest.raises(KeyboardInterrupt):
        train(loop)
    assert load_checkpoint(loop.checkpoint_path).step == 2

    again = make_loop(tmp_path, "data.epochs=2", "run.checkpoint_every=2")
    again.restore(load_checkpoint(again.checkpoint_path))
    train(again)

    assert [record["step"] for record in numbers(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("threshold", "warnings"), [(-1.0, 1), (1.0, 0)])
def test_steps_without_one_clean_token_are_said_once(tmp_path, caplog, threshold, warnings):
    settings = [
        f"filters.fp_gp.threshold={threshold}",
        "filters.register_guided.enabled=false",
        "filters.attention_hijack.enabled=false",
    ]

    train(make_loop(tmp_path, *settings))

    assert len(numbers(tmp_path / "out")) == 6
    assert caplog.text.count("the filters left no crop token") == warnings


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_terms_named(tmp_path, broken):
    loop = make_loop(tmp_path, "data.epochs=2")
    original, forwards = loop.refiner.forward, []

    def forward(images, draws):
        loss, terms = original(images, draws)
        forwards.append(1)
        if len(forwards) == 3:
            loss, terms = loss * broken, terms | {"absorption": torch.tensor(broken)}
            terms["loss"] = loss.detach()
        before.update(trained_weights(loop))
        return type(original(images, draws))(loss, terms)

    before = {}
    loop.refiner.forward = forward

    with pytest.raises(NonFiniteError, match=r"step 3: loss, absorption, grad_norm not finite"):
        train(loop)

    after = trained_weights(loop)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert [record["step"] for record in numbers(tmp_path / "out")] == [1, 2]


def run(tmp_path, *settings, output="out", stop=None, **changes):
    images = tmp_path / "images"
    if not images.exists():
        image_folder(images)
    model = tmp_path / "model"
    if not model.exists():
        model_folder(model)
    return refine(
        small_recipe(f"backbone.name={model}", *settings),
        images,
        tmp_path / output,
        device=torch.device("cpu"),
        stop=stop or StopRequest(),
        console=Console(quiet=True),
        **changes,
    )


def test_two_steps_make_an_artifact_whose_tokens_are_the_merged_students(tmp_path, monkeypatch):
    def keep(loop, *args, **kwargs):
        expected.append(loop.refiner.eval().backbone.encode(pixels).tokens.detach())
        return write(loop, *args, **kwargs)

    import trainer.run

    write, expected, pixels = trainer.run._write_artifact, [], torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(trainer.run, "_write_artifact", keep)

    summary = run(tmp_path, "run.max_steps=2", "optim.lr=0.01")

    artifact = load_artifact(summary.artifact)
    torch.testing.assert_close(artifact.backbone.encode(pixels).tokens, expected[0])
    untouched = Backbone.load(tmp_path / "model").encode(pixels).tokens
    assert not torch.allclose(untouched, expected[0], atol=1e-3)
    assert summary.num_steps == 2


def test_an_artifact_says_what_it_is(tmp_path):
    summary = run(tmp_path, "run.max_steps=2", "registers.seed=9", "registers.fill=uniform")

    manifest = load_artifact(summary.artifact).manifest
    assert manifest.native_size == (64, 64)
    assert (manifest.border.fill, manifest.border.seed) == ("uniform", 9)
    assert manifest.recipe["run"]["max_steps"] == 2
    assert manifest.data["images"] == 6
    assert manifest.data["images_seen"] == 4
    assert {"loss", "clean", "alignment"} <= manifest.metrics.keys()
    assert (summary.artifact / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert (summary.artifact / "adapter" / "adapter_model.safetensors").is_file()
    card = (summary.artifact / "README.md").read_text()
    assert "vit_tiny_patch16_224, refined" in card
    assert "$" not in card
    features = open_model(summary.artifact).encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert features[0].grid == (4, 4)


def test_a_learned_border_is_served_as_it_was_trained(tmp_path):
    settings = ["run.max_steps=2", "registers.fill=learnable", "optim.lr=0.1"]

    summary = run(tmp_path, *settings)

    learned = load_artifact(summary.artifact).learned_border
    assert learned is not None
    assert learned.patches.abs().sum() > 0


@pytest.mark.parametrize("fill", ["gaussian", "learnable"])
def test_a_run_cut_in_the_middle_and_resumed_makes_the_same_artifact(tmp_path, fill, monkeypatch):
    settings = ["data.epochs=1.5", f"registers.fill={fill}", "channels.max_channels=2"]
    whole = run(tmp_path, *settings, output="whole")

    import trainer.run

    original = trainer.run.Loop

    def make_stopping_loop(*args, **kwargs):
        loop = original(*args, **kwargs)
        stop, train = StopAfter(loop, 2), loop.train
        loop.train = lambda _stop, console: train(stop, console)
        return loop

    with monkeypatch.context() as patch:
        patch.setattr(trainer.run, "Loop", make_stopping_loop)
        with pytest.raises(Interrupted):
            run(tmp_path, *settings, output="cut")
    assert not (tmp_path / "cut" / "refined").exists()
    allowed = ["run.checkpoint_every=7", "run.gradient_checkpointing=true"]
    cut = run(tmp_path, *settings, *allowed, output="cut", resume=True)

    digests = [load_artifact(summary.artifact).manifest.digest for summary in (whole, cut)]
    assert digests[0] == digests[1]
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_deterministic_runs_give_the_same_bits_and_leave_no_mode_behind(tmp_path):
    settings = ["run.deterministic=true", "run.max_steps=2", "loss.lambda_con=0.4"]

    summaries = [run(tmp_path, *settings, output=output) for output in ("one", "other")]

    digests = {load_artifact(summary.artifact).manifest.digest for summary in summaries}
    assert len(digests) == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_earlier_run_is_not_overwritten(tmp_path):
    run(tmp_path, "run.max_steps=1")

    with pytest.raises(CheckpointError, match="holds an earlier run; continue it with --resume"):
        run(tmp_path, "run.max_steps=1")


def test_resuming_a_run_that_is_done_writes_the_same_artifact_again(tmp_path):
    summaries = [run(tmp_path, "run.max_steps=2", resume=resume) for resume in (False, True)]

    assert summaries[0].metrics == summaries[1].metrics
    manifest = load_artifact(summaries[1].artifact).manifest
    assert manifest.data["images_seen"] == 4
    assert [record["step"] for record in numbers(tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.temperature=0.3", "other values of loss.temperature"),
        ("images", "images are not those"),
        ("weights", "weights are not those"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, message):
    run(tmp_path, "run.max_steps=1")
    settings = ["run.max_steps=1"]
    if change == "images":
        (tmp_path / "images" / "000.png").unlink()
    elif change == "weights":
        (tmp_path / "model").rename(tmp_path / "old")
        model_folder(tmp_path / "model", seed=1)
    else:
        settings.append(change)

    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, *settings, resume=True)


def test_resuming_where_nothing_was_saved_starts_anew_and_says_so(tmp_path, caplog):
    summary = run(tmp_path, "run.max_steps=1", resume=True)

    assert summary.num_steps == 1
    assert "no checkpoint in" in caplog.text


def test_skipped_images_are_counted(tmp_path):
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "000bad.jpg").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"000bad\.jpg"):
        run(tmp_path, "data.epochs=1", output="strict")
    summary = run(tmp_path, "data.epochs=1", skip_bad_images=True)

    assert summary.num_skipped == 1
    assert load_artifact(summary.artifact).manifest.data["skipped"] == 1


def test_the_reference_image_can_be_another(tmp_path):
    image_folder(tmp_path / "images")
    other = tmp_path / "images" / "000.png"
    settings = ["run.max_steps=1", "filters.fp_gp.threshold=0.9"]

    run(tmp_path, *settings, output="shipped")
    run(tmp_path, *settings, f"crops.reference={other}", output="other")

    first, second = numbers(tmp_path / "shipped"), numbers(tmp_path / "other")
    assert first != second
    with pytest.raises(DataError, match="reference image .* cannot be read"):
        run(tmp_path, f"crops.reference={tmp_path / 'none.png'}", output="missing")


def test_the_channel_mask_is_found_before_training_and_recorded(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = model_folder(tmp_path / "model") / "model.safetensors"
    state = load_file(weights)
    state["norm.bias"][7] = 40.0
    save_file(state, weights)

    summary = run(tmp_path, "channels.max_channels=5", "run.max_steps=1")
    off = run(tmp_path, "channels.max_channels=0", "run.max_steps=1", output="off")

    assert summary.channels[0] == 7
    assert load_artifact(summary.artifact).manifest.channel_mask == tuple(summary.channels)
    assert off.channels == []


def test_metrics_are_one_json_object_per_step(tmp_path):
    run(tmp_path, "run.max_steps=3")

    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm", "clean", *TIMING} <= r.keys() for r in records)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_events_are_written_when_asked_for(tmp_path):
    pytest.importorskip("tensorboard")

    run(tmp_path, "run.max_steps=1", "run.tensorboard=true")

    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    run(tmp_path, "run.max_steps=1")
    path = checkpoint_path(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tmp_path, "run.max_steps=1", resume=True)
