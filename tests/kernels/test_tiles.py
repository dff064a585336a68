"""Tile tables."""

import json

import pytest
import torch

from kernels import tiles

CPU = torch.device("cpu")
FOLDER = tiles._FOLDER


@pytest.fixture
def table(monkeypatch):
    rows = [
        {"up_to": {"head_dim": 64, "bytes": 2}, "tiles": {"BLOCK": 128}},
        {"up_to": {"head_dim": 64}, "tiles": {"BLOCK": 64}},
        {"tiles": {"BLOCK": 32}},
    ]
    monkeypatch.setattr(tiles, "_table", lambda _name: {"op": rows, "narrow": rows[:1]})


@pytest.mark.parametrize(
    ("facts", "block"),
    [
        ({"head_dim": 64, "bytes": 2}, 128),
        ({"head_dim": 64, "bytes": 4}, 64),
        ({"head_dim": 72, "bytes": 2}, 32),
    ],
)
@pytest.mark.usefixtures("table")
def test_the_first_row_that_holds_counts(facts, block):
    assert tiles.tiles("op", CPU, **facts) == {"BLOCK": block}


@pytest.mark.usefixtures("table")
def test_no_row_that_holds_is_an_error():
    with pytest.raises(LookupError, match="no row of narrow in sm_90.json"):
        tiles.tiles("narrow", CPU, head_dim=72, bytes=2)


def test_gpus_without_a_table_take_the_default_and_say_so(monkeypatch, caplog):
    tiles.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    assert tiles.architecture(torch.device("cuda", 0)) == "default"
    assert "no table of tiles for sm_86" in caplog.text

    tiles.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert tiles.architecture(torch.device("cuda", 0)) == "sm_90"
    tiles.architecture.cache_clear()


def test_every_table_has_the_same_kernels():
    tables = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]

    assert len(tables) >= 2
    assert tables[0]
    assert all(table.keys() == tables[0].keys() for table in tables)
