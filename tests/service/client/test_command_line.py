"""`python -m service.client`: files in, one safetensors file out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from service.client import Features
from service.client.__main__ import main
from service.client.feature_file import FeatureFile, FeatureFileError
from service.client.tensors import RawTensor
from tests.service.client.fake_service import (
    DIGEST,
    FRAMES,
    Script,
    error,
    frames,
    mark,
    running,
    suited,
)
from tests.support import ROOT


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("service.client.retry.FIRST_DELAY_SECONDS", 0.002)


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, and a file that is none."""
    root = tmp_path / "photographs"
    (root / "more").mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "more/c.webp"):
        (root / name).write_bytes(name.encode() * 5)
    (root / "notes.txt").write_text("no image")
    return root


def run(server, *arguments):
    return main([*map(str, arguments), "--url", server.url])


def test_a_folder_becomes_one_file(folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"

    with running(Script()) as server:
        status = run(server, folder, "--out", out, "--size=448", "--dtype=float16", "--layers=-1")

    assert status == 0
    assert capsys.readouterr().err == f"saved features of 3 of 3 images to {out}\n"
    tensors = safetensors.torch.load_file(out)
    assert sorted(tensors) == ["a.jpg", "b.PNG", "more/c.webp"]
    for name, tensor in tensors.items():
        assert (tensor == mark((folder / name).read_bytes())).all()
    with safetensors.safe_open(out, "pt") as file:
        described = file.metadata()
    assert (described["model_digest"], described["layers"]) == (DIGEST, "[11]")
    images = {item["name"]: item for item in json.loads(described["images"])}
    assert images["a.jpg"]["grid"] == [2, 3]
    assert images["a.jpg"]["affine"] == [[0.0625, 0, 0], [0, 0.0625, 0]]
    assert server.script.asked[0].options == {
        "size": 448,
        "dtype": "float16",
        "layers": [-1],
        "partial": True,
    }


@pytest.mark.usefixtures("folder")
def test_files_and_folders_are_called_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with running(Script()) as server:
        run(server, "photographs/more", "photographs/a.jpg", "--out", "x.safetensors")

    names = sorted(safetensors.torch.load_file("x.safetensors"))
    assert names == ["photographs/a.jpg", "photographs/more/c.webp"]


def test_failures_are_listed_and_the_others_are_saved(folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    bad = {"code": "undecodable_image", "message": "image 1: it is broken", "retryable": False}

    with running(Script(lambda asked: (200, FRAMES, frames(asked, errors={1: bad})))) as server:
        status = run(server, folder, "--out", out)

    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert lines == [
        "error: b.PNG: it is broken [undecodable_image] (request r-1)",
        f"saved features of 2 of 3 images to {out}",
    ]
    assert sorted(safetensors.torch.load_file(out)) == ["a.jpg", "more/c.webp"]


def test_a_wrong_key_saves_nothing_and_leaves_the_old_file(folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    out.write_text("old")
    key = tmp_path / "key"
    key.write_text("secret\n")

    with running(Script(error(401, "unauthorized"))) as server:
        status = run(server, folder, "--out", out, "--api-key-file", key)

    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert lines == [
        "error: 3 images: unauthorized happened [unauthorized] (request r-9)",
        "nothing was saved",
    ]
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "key", "photographs"]
    assert server.script.asked[0].headers["authorization"] == "Bearer secret"


def test_what_was_done_before_the_key_was_revoked_is_kept(folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"

    with running(Script(suited, error(401, "unauthorized"))) as server:
        status = run(server, folder, "--out", out, "--batch-images=1", "--connections=1")

    assert status == 1
    assert "error: 2 images: unauthorized happened" in capsys.readouterr().err
    assert len(safetensors.torch.load_file(out)) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "no images in empty; searched for .avif"),
        (["empty/../a.jpg", "--api-key-file", "nowhere"], "--api-key-file nowhere: No such file"),
        (["empty/../a.jpg", "--api-key-file", "a.jpg"], "holds 2 words"),
        (["a.jpg", "--url", "localhost"], "url is 'localhost'"),
        (["a.jpg", "--connections", "0"], "max_connections is 0"),
    ],
)
def test_arguments_that_lead_nowhere_end_with_2(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_text("two words")

    assert main([*arguments, "--out", "x"]) == 2

    assert reason in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(folder, tmp_path, capsys):
    script = Script()
    with running(script) as server:
        missing = run(server, folder, "--out", tmp_path / "none" / "x.safetensors")
        a_folder = run(server, folder, "--out", tmp_path)

    assert script.asked == []
    assert (missing, a_folder) == (2, 2)
    told = capsys.readouterr().err
    assert "there is no folder" in told
    assert "is a folder; name a file in it" in told


def test_another_model_in_between_is_a_failure(folder, tmp_path, capsys):
    def changed(asked):
        return 200, FRAMES, frames(asked).replace(DIGEST.encode(), b"e" * 64)

    with running(Script(suited, changed)) as server:
        status = run(server, folder, "--out", tmp_path / "x", "--batch-images=1", "--connections=1")

    assert status == 1
    assert "b.PNG has model_digest eeee" in capsys.readouterr().err


def test_on_a_terminal_there_is_progress(folder, tmp_path):
    master, slave = os.openpty()

    with running(Script()) as server:
        command = [sys.executable, "-m", "service.client", str(folder), "--url", server.url]
        done = subprocess.run([*command, "--out", str(tmp_path / "x")], cwd=ROOT, stderr=slave)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)

    assert done.returncode == 0
    assert "3/3" in shown


def raw(tensor):
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}[tensor.dtype]
    return RawTensor(dtype, tuple(tensor.shape), memoryview(tensor.numpy().tobytes()))


def features(tensors, layers=(11,), **changes):
    values = {
        "index": 0,
        "tensors": {key: raw(tensor) for key, tensor in tensors.items()},
        "layer_numbers": layers,
        "grid": (1, 3),
        "original_size": (16, 48),
        "resized_to": (16, 48),
        "bucket": None,
        "affine": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        "num_boxes": None,
        "patch_size": 16,
        "dtype": "int8",
        "layout": "grid",
        "model": "m",
        "model_digest": "d",
        "cache": None,
        "request_id": None,
    }
    return Features(**(values | changes))


def test_all_parts_and_layers_are_aligned_to_their_numbers(tmp_path):
    parts = {
        (layer, name): tensor
        for layer in (3, 11)
        for name, tensor in {
            "features": torch.randint(-9, 9, (1, 3, 5), dtype=torch.int8),
            "scale": torch.rand(1, 3),
            "cls": torch.rand(1, 5).half(),
        }.items()
    }

    with FeatureFile(tmp_path / "x") as file:
        file.add("a", features(parts, (3, 11)))
        file.add("b", features(parts, (3, 11)))
        file.add("c", features(parts, (3, 11)))
        file.save()

    saved = safetensors.torch.load_file(tmp_path / "x")
    assert len(saved) == 18
    for name in ("a", "b", "c"):
        assert torch.equal(saved[f"{name}.layer3"], parts[3, "features"])
        assert torch.equal(saved[f"{name}.layer11.scale"], parts[11, "scale"])
        assert torch.equal(saved[f"{name}.layer3.cls"], parts[3, "cls"])
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            width = saved[name].element_size()
            assert (8 + length + entry["data_offsets"][0]) % width == 0


def test_a_file_that_is_not_saved_leaves_nothing_behind(tmp_path):
    with FeatureFile(tmp_path / "x") as file:
        file.add("a", features({(11, "features"): torch.zeros(1, 3, 5)}))

    assert list(tmp_path.iterdir()) == []


def test_a_file_without_images_is_refused(tmp_path):
    with FeatureFile(tmp_path / "x") as file, pytest.raises(FeatureFileError, match="no features"):
        file.save()


def test_a_saved_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with FeatureFile(tmp_path / "x") as file:
            file.add("a", features({(11, "features"): torch.zeros(1, 3, 5)}))
            file.save()
    finally:
        os.umask(before)

    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_numbers_are_written_as_they_came(tmp_path):
    tensor = torch.tensor(np.random.default_rng(0).normal(size=(1, 3, 5)), dtype=torch.float32)

    with FeatureFile(tmp_path / "x") as file:
        file.add("a", features({(11, "features"): tensor}))
        file.save()

    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["a"], tensor)
