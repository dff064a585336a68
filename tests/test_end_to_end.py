"""Photographs in, refined backbone out, clean features over HTTP."""

import os
import subprocess
import sys
import urllib.request

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from timm.models._hub import save_for_hf

from backbone import Backbone, load_artifact
from backbone.preprocess import load_image, normalize, resize_image
from backbone.registers import canvas_size, seeded_border, strip, surround
from tests.support import ROOT, running_server, tiny_vit

PHOTOGRAPHS = ROOT / "examples" / "photographs"


def run_trainer(output, backbone, *settings):
    changes = (
        "run.max_steps=2",
        "run.precision=fp32",
        "data.size=64",
        "data.batch_size=2",
        "filters.attention_hijack.layers=[0, 1]",
        "optim.lr=0.01",  # two steps must move the weights visibly
        *settings,
    )
    command = [sys.executable, "-m", "trainer", "--images", str(PHOTOGRAPHS), "--device", "cpu"]
    command += ["--output", str(output), "--backbone", str(backbone)]
    for change in changes:
        command += ["--set", change]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("recipe_settings", [(), ("registers.fill=zeros", "loss.matched=false")])
def test_what_was_trained_is_what_is_served(tmp_path, recipe_settings):
    # given a pre-trained backbone, refined for two steps by the command
    raw = tmp_path / "raw"
    save_for_hf(tiny_vit(), raw, safe_serialization=True)
    run_trainer(tmp_path / "run", raw, *recipe_settings)
    refined = tmp_path / "run" / "refined"

    # when a photograph is sent to a server of the artifact
    photograph = PHOTOGRAPHS / "cat.jpg"
    flags = ("--model", str(refined), "--precision", "fp32", "--device", "cpu")
    with running_server(tmp_path / "server.log", *flags) as url:
        request = urllib.request.Request(
            f"{url}/features?dtype=float32&layout=tokens",
            photograph.read_bytes(),
            {"Content-Type": "image/jpeg"},
        )
        with urllib.request.urlopen(request) as response:
            served = load(response.read())["features.0"]

    # then the answer is the student's own forward: raw weights with the trained adapter on top
    manifest = load_artifact(refined).manifest
    student = Backbone.load(raw)
    adapted = PeftModel.from_pretrained(student.vit, str(refined / "adapter")).eval()
    pixels = resize_image(load_image(photograph), manifest.native_size)
    pixels = normalize(pixels[None], mean=student.mean, std=student.std)
    width = manifest.border.width((4, 4))
    canvas = canvas_size((64, 64), width, 16)
    border = seeded_border(manifest.border.fill, canvas, manifest.border.seed)
    surrounded = surround(pixels, border, width=width, patch_size=16)
    with torch.no_grad():
        expected = strip(student.encode(surrounded).tokens, (4, 4), width).image[0]
        with adapted.disable_adapter():
            teacher = strip(student.encode(surrounded).tokens, (4, 4), width).image[0]
    torch.testing.assert_close(served, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, teacher, atol=1e-2), "two steps changed nothing"
