"""Host memory at the peak of loading: the weights, and one file of the checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backbone.checkpoints.eva_clip_reference import EvaClipReference
from tests.backbone.checkpoints.test_loading import write_shards

DIM, DEPTH, NUM_SHARDS = 576, 12, 4
MIB = 2**20

LOAD = """
import pathlib, sys, torch
from backbone import Backbone, catalog
from backbone.catalog import Entry

class SmallEntry(Entry):
    model_args = {{"img_size": 56, "embed_dim": {dim}, "depth": {depth}, "num_heads": 2}}

entry = catalog.CATALOG["eva-clip-8b-448"]
fields = {{name: getattr(entry, name) for name in entry.__dataclass_fields__}}
catalog.CATALOG = {{"eva": SmallEntry(**fields)}}

def mebibytes(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) / 1024

(torch.randn(64, 64, dtype=torch.float32) @ torch.randn(64, 64)).bfloat16().sum()  # its libraries
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = mebibytes("VmRSS")
backbone = Backbone.load("eva", weights=pathlib.Path(sys.argv[1]), dtype=torch.bfloat16)
print(before, mebibytes("VmHWM"), sum(p.nbytes for p in backbone.parameters()) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_costs_the_weights_and_one_file(tmp_path, kind):
    with torch.device("meta"):
        reference = EvaClipReference(dim=DIM, depth=DEPTH)
    tensors = {key: torch.full(t.shape, 0.01) for key, t in reference.state_dict().items()}
    folder = write_shards(tmp_path / kind, tensors, num_shards=NUM_SHARDS, kind=kind)
    largest = max(path.stat().st_size for path in folder.glob(f"*.{kind}")) / MIB
    total = sum(path.stat().st_size for path in folder.glob(f"*.{kind}")) / MIB
    assert total > 200

    child = subprocess.run(
        [sys.executable, "-c", LOAD.format(dim=DIM, depth=DEPTH), str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=True,
    )

    before, peak, weights = map(float, child.stdout.split())
    assert weights == pytest.approx(total / 2, rel=0.01)  # bfloat16 of float32
    # Parts of q, k and v that wait for another file, and what Python itself takes.
    slack = 30
    assert peak - before <= weights + largest + slack
    assert peak - before < total
