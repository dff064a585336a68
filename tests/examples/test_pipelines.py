"""The example pipelines, in a short form, against a service as a process."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT, noise_image, running_server, tiny_artifact

COLOURS = ((200, 40, 40), (40, 60, 200), (60, 180, 60))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    artifact = tiny_artifact(folder / "tiny")
    arguments = ("--model", str(artifact), "--precision", "fp32", "--torch-threads", "1")
    with running_server(folder / "log", *arguments) as url:
        yield url


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_scene(folder, name, seed):
    """Stripes of three colours, and which class each pixel is."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(3)
    label = np.repeat(order.astype(np.uint8), 16)[:, None].repeat(64, axis=1)
    pixels = np.array(COLOURS)[label] + draw.integers(-20, 20, (*label.shape, 3))
    label[0] = 255
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{name}.png")
    Image.fromarray(label).save(folder / "labels" / f"{name}.png")


@pytest.fixture
def scenes(tmp_path):
    data = tmp_path / "data"
    for part, count in (("train", 12), ("val", 4)):
        for number in range(count):
            write_scene(data / part, str(number), seed=count + number)
    (data / "classes.json").write_text('{"0": "red", "1": "blue", "2": "green"}')
    return data


@pytest.mark.slow
def test_the_segmentation_pipeline_learns_and_keeps_its_features(server, scenes, tmp_path):
    output = tmp_path / "output"
    arguments = ("--data", scenes, "--output", output, "--url", server, "--size", 64)

    first = run("segment_camvid.py", *arguments, "--epochs", 30, "--batch-size", 32)
    second = run("segment_camvid.py", *arguments, "--epochs", 1)

    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", first)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] / 2
    assert "fetched 12 images" in first
    (miou,) = re.findall(r"mIoU ([\d.]+) on 4 images", first)
    assert float(miou) > 60
    with Image.open(output / "prediction.png") as picture:
        assert picture.size == (3 * 64, 48)
    assert "fetched" not in second


@pytest.mark.slow
def test_the_diffusion_loop_learns_with_and_without_alignment(server, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for seed in range(6):
        image = noise_image(6, 8, seed).resize((80, 60), Image.Resampling.BICUBIC)
        image.save(photographs / f"{seed}.jpg")
    output = tmp_path / "output"

    run(
        "diffusion/train.py",
        *("--images", photographs, "--output", output, "--url", server),
        *("--steps", 40, "--log-every", 10, "--batch-size", 8),
        *("--side", 16, "--dim", 32, "--depth", 2),
    )

    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40]
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    first, last = entries[0], entries[-1]
    assert last["plain_velocity"] < first["plain_velocity"]
    assert last["aligned_velocity"] < first["aligned_velocity"]
    assert last["aligned_cosine"] > first["aligned_cosine"]


def test_the_diffusion_loop_says_when_there_are_no_images(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/diffusion/train.py", "--images", tmp_path, "--output", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert f"no images in {tmp_path}" in done.stderr
