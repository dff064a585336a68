"""What several tests need: tiny backbones in the published formats, images, data folders."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from backbone import Backbone, RegisterBorder, save_artifact

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
DATA = Path(os.environ.get("VIT_REFINERY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def data_folder(name: str) -> Path:
    """A folder of real images; skips the test, and says so, where there is none."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set VIT_REFINERY_TEST_DATA to run on real images")
    return folder


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A timm model of two blocks of 32 channels with random weights."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": 64,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    return timm.create_model(name, pretrained=False, **(arguments | changes)).eval()


def tiny_backbone(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> Backbone:
    return Backbone(tiny_vit(name, seed, **changes), name=name)


def tiny_artifact(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """An artifact of a tiny backbone."""
    arguments: dict[str, Any] = {"border": RegisterBorder(seed=7), "model_card": "# tiny\n"}
    save_artifact(folder, tiny_backbone(seed=seed), **(arguments | changes))
    return folder


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def running_server(log: Path, *arguments: str) -> Iterator[str]:
    """`python -m service` as a process on a free port; yields its URL once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"{url}/readyz"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as response:
            return bool(response.status == 200)
    except OSError:
        return False
