"""Pre-training of the small backbone that ships."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.support import ROOT


def pretrain(output, *flags):
    subprocess.run(
        [sys.executable, "-m", "examples.demo_backbone.pretrain", "--threads", "1"]
        + ["--images", str(ROOT / "examples" / "photographs"), "--output", str(output), *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    return load_file(output / "model.safetensors")


@pytest.mark.slow
def test_a_run_may_start_from_the_weights_of_another_and_timm_loads_both(tmp_path):
    first = pretrain(tmp_path / "first", "--steps", "1")

    # the learning rate of a first step is zero
    second = pretrain(tmp_path / "second", "--steps", "1", "--start", str(tmp_path / "first"))

    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)
    record = json.loads((tmp_path / "second" / "pretrain.json").read_text())
    assert record["start"]["steps"] == 1
    assert record["start"]["start"] is None
    model = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    torch.testing.assert_close(
        model.state_dict(), {name: value.float() for name, value in second.items()}
    )
