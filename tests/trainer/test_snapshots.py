import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.trainer.refining import (
    image_folder,
    model_folder,
    random_images,
    small_recipe,
    small_refiner,
)
from trainer.data import BadImages, ImageFolder
from trainer.loop import StopRequest
from trainer.run import refine
from trainer.snapshots import Snapshots


def snapshots_of(tmp_path, refiner, **changes):
    recipe = small_recipe("run.snapshot_every=1", "run.preview_images=2")
    folder = tmp_path / "snapshots"
    return Snapshots(folder, refiner, refiner._adapter, recipe, random_images(2), **changes)


def cells_of(path):
    """Rows of columns of a sheet, without its header."""
    sheet = np.asarray(Image.open(path))[22:]
    return sheet.reshape(2, 256, 3, 256, 3).transpose(0, 2, 1, 3, 4)


def test_a_snapshot_shows_the_student_in_the_colours_of_its_raw_features(tmp_path):
    refiner = small_refiner(trained=False)
    snapshots = snapshots_of(tmp_path, refiner)

    snapshots.take(100)
    with torch.no_grad():
        for name, parameter in refiner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    snapshots.take(200)

    assert [p.name for p in sorted((tmp_path / "snapshots").iterdir())] == [
        "step-000100.png",
        "step-000200.png",
    ]
    first = cells_of(tmp_path / "snapshots" / "step-000100.png")
    second = cells_of(tmp_path / "snapshots" / "step-000200.png")
    np.testing.assert_array_equal(first[:, :2], second[:, :2])  # image and before stay
    assert (first[:, 2] != second[:, 2]).any()


def test_a_snapshot_leaves_the_student_and_all_generators_as_they_were(tmp_path):
    refiner = small_refiner().train()
    weights = {n: p.clone() for n, p in refiner.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    snapshots_of(tmp_path, refiner).take(1)

    assert torch.equal(torch.rand(1), expected)
    assert refiner.training
    layer = refiner.backbone.vit.blocks[0].attn.qkv
    assert layer.lora_dropout["default"].training
    assert all(torch.equal(p, weights[n]) for n, p in refiner.named_parameters())
    assert all(p.grad is None for p in refiner.parameters())


def test_a_run_draws_what_it_is_asked_for(tmp_path):
    image_folder(tmp_path / "images", count=2)
    model = model_folder(tmp_path / "model")
    recipe = small_recipe(
        f"backbone.name={model}", "run.max_steps=3", "data.epochs=9", "run.snapshot_every=2"
    )

    with StopRequest() as stop:
        refine(
            recipe,
            tmp_path / "images",
            tmp_path / "run",
            device=torch.device("cpu"),
            stop=stop,
            console=Console(stderr=True),
        )

    assert [p.name for p in (tmp_path / "run" / "snapshots").iterdir()] == ["step-000002.png"]


def test_snapshots_of_a_run_are_of_its_first_readable_images(tmp_path):
    images = image_folder(tmp_path / "images", count=3)
    (images / "000.png").write_bytes(b"no image")
    folder = ImageFolder.scan(images, seed=0, max_images=None)
    refiner = small_refiner()
    bad = BadImages(skip=True)

    def of_run(*settings):
        recipe = small_recipe(*settings, "run.preview_images=2", "data.max_bad_share=1")
        return Snapshots.of_run(tmp_path, refiner, refiner._adapter, recipe, folder, bad)

    assert of_run() is None
    of_run("run.snapshot_every=7").take(7)
    with Image.open(tmp_path / "snapshots" / "step-000007.png") as sheet:
        assert sheet.size == (3 * 256, 22 + 2 * 256)


def test_a_learned_border_stays_on_its_device(tmp_path, monkeypatch):
    # On a GPU, the optimiser's state would be left behind there.
    refiner = small_refiner(small_recipe("registers.fill=learnable"))
    monkeypatch.setattr(refiner.border, "_apply", lambda *_, **__: pytest.fail("it was moved"))

    snapshots_of(tmp_path, refiner).take(1)

    assert (tmp_path / "snapshots" / "step-000001.png").is_file()
