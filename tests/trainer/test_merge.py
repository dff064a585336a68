"""Adapters shipped without weights: python -m trainer.merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from backbone import Backbone, load_artifact
from tests.support import ROOT
from tests.trainer.refining import image_folder, model_folder, small_recipe
from trainer.adapter_file import DESCRIPTION_FILE, read_description
from trainer.loop import StopRequest
from trainer.merge import main
from trainer.run import refine


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch):
    import logging

    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def refined(folder: Path, *settings: str) -> Path:
    """A run of two steps of a model folder; its folder."""
    if not (folder / "model").exists():
        model_folder(folder / "model")
        image_folder(folder / "images")
    recipe = small_recipe(f"backbone.name={folder / 'model'}", "run.max_steps=2", *settings)
    with StopRequest() as stop:
        refine(
            recipe,
            folder / "images",
            folder / "run",
            device=torch.device("cpu"),
            stop=stop,
            console=Console(stderr=True),
        )
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = ("lora.rank=3", "optim.lr=1e-2", "run.measure_images=1")
    return refined(tmp_path_factory.mktemp("merge"), *settings)


def merge(adapter, output, *more, backbone):
    arguments = ["--backbone", backbone, "--adapter", adapter, "--output", output, *more]
    return main([str(argument) for argument in arguments])


def weights_of(artifact):
    return (artifact / "model.safetensors").read_bytes()


def manifest_of(artifact):
    return json.loads((artifact / "refinery.json").read_text())


def test_base_weights_and_adapter_give_the_artifact_of_the_run(run, tmp_path, capsys):
    code = merge(run / "refined/adapter", tmp_path / "merged", backbone=run.parent / "model")

    assert code == 0
    assert weights_of(tmp_path / "merged") == weights_of(run / "refined")
    assert manifest_of(tmp_path / "merged") == manifest_of(run / "refined")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card == (run / "refined" / "README.md").read_text()
    assert manifest_of(run / "refined")["digest"] in capsys.readouterr().out
    base = load_file(run.parent / "model" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(base[name], merged[name])  # there was something to merge


def test_the_shipped_adapter_and_base_give_the_shipped_artifact(tmp_path):
    models = ROOT / "models"

    code = merge(models / "demo/adapter", tmp_path / "demo", backbone=models / "demo-pretrained")

    assert code == 0
    assert weights_of(tmp_path / "demo") == weights_of(models / "demo")
    old, new = manifest_of(models / "demo"), manifest_of(tmp_path / "demo")
    assert {name: new[name] for name in old.keys() - {"versions"}} == {
        name: old[name] for name in old.keys() - {"versions"}
    }


@pytest.mark.parametrize("fill", ["gaussian", "learnable"])
@pytest.mark.parametrize("source", ["run", "run/refined", "run/checkpoint.pt"])
def test_an_exported_adapter_gives_the_artifact_of_the_run(tmp_path, fill, source):
    run = refined(tmp_path, f"registers.fill={fill}", "run.weights_dtype=float16")
    artifact = run / "refined"
    if "refined" not in source:  # what is exported comes from the checkpoint then
        artifact = shutil.move(artifact, tmp_path / "refined")

    exported = main(["--export", str(tmp_path / source), "--output", str(tmp_path / "adapter")])
    code = merge(tmp_path / "adapter", tmp_path / "merged", backbone=tmp_path / "model")

    assert (exported, code) == (0, 0)
    assert weights_of(tmp_path / "merged") == weights_of(artifact)
    assert manifest_of(tmp_path / "merged") == manifest_of(artifact)
    load_artifact(tmp_path / "merged")


def test_an_adapter_of_a_checkpoint_loads_with_peft_alone(run, tmp_path):
    from peft import PeftModel

    from tests.support import tiny_vit

    main(["--export", str(run / "checkpoint.pt"), "--output", str(tmp_path / "adapter")])
    vit = tiny_vit()
    model = PeftModel.from_pretrained(vit, str(tmp_path / "adapter")).merge_and_unload()

    served = load_file(run / "refined" / "model.safetensors")
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(model.state_dict()[name], served[name])


def test_an_adapter_says_what_it_belongs_to(run):
    described = read_description(run / "refined" / "adapter")

    manifest = load_artifact(run / "refined").manifest
    assert described.base.name == str(run.parent / "model")
    assert described.base.architecture == "vit_tiny_patch16_224"
    assert described.border == manifest.border
    assert described.recipe["lora"]["rank"] == 3
    assert len(described.base.digest) == 64


def test_other_weights_are_refused_with_both_named_unless_forced(run, tmp_path, capsys, caplog):
    other = model_folder(tmp_path / "other", seed=1)

    code = merge(run / "refined/adapter", tmp_path / "merged", backbone=other)
    message = capsys.readouterr().err

    assert code == 2
    assert read_description(run / "refined/adapter").base.digest[:12] in message
    assert str(other) in message
    assert "--force" in message
    assert not (tmp_path / "merged").exists()
    assert merge(run / "refined/adapter", tmp_path / "merged", "--force", backbone=other) == 0
    assert "applied all the same" in caplog.text
    assert "weights of digest" in (tmp_path / "merged" / "README.md").read_text()


def test_the_scale_is_a_factor_on_what_the_adapter_adds(run, tmp_path):
    base = load_file(run.parent / "model" / "model.safetensors")["blocks.0.attn.proj.weight"]
    full = load_file(run / "refined" / "model.safetensors")["blocks.0.attn.proj.weight"]

    merge(run / "refined/adapter", tmp_path / "half", "--scale", 0.5, backbone=run.parent / "model")

    half = load_file(tmp_path / "half" / "model.safetensors")["blocks.0.attn.proj.weight"]
    torch.testing.assert_close(half, (base + full) / 2)
    assert manifest_of(tmp_path / "half")["data"]["adapter_scale"] == 0.5


def test_an_adapter_without_description_is_refused_with_what_to_do(run, tmp_path, capsys):
    old = shutil.copytree(run / "refined" / "adapter", tmp_path / "old")
    (old / DESCRIPTION_FILE).unlink()

    assert merge(old, tmp_path / "merged", backbone=run.parent / "model") == 2

    assert "with --resume" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "is not an adapter"),
        (lambda f: (f / DESCRIPTION_FILE).write_text("{"), "cannot be read"),
        (lambda f: (f / DESCRIPTION_FILE).write_text('{"schema_version": 9}'), "schema version 9"),
        (lambda f: (f / DESCRIPTION_FILE).write_text('{"schema_version": 1}'), "not a valid"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "cannot be put into"),
    ],
)
def test_a_damaged_adapter_is_an_error(run, tmp_path, capsys, break_it, message):
    adapter = shutil.copytree(run / "refined" / "adapter", tmp_path / "adapter")
    break_it(adapter)

    assert merge(adapter, tmp_path / "merged", backbone=run.parent / "model") == 2

    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_rank_than_its_configuration_says_is_refused(run, tmp_path, capsys):
    adapter = shutil.copytree(run / "refined" / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))

    assert merge(adapter, tmp_path / "merged", backbone=run.parent / "model") == 2

    assert "[3, 32] in the file and [5, 32] in the model" in capsys.readouterr().err


def test_a_checkpoint_without_its_description_is_not_exported(run, tmp_path, capsys):
    shutil.copy(run / "checkpoint.pt", tmp_path)

    code = main(["--export", str(tmp_path / "checkpoint.pt"), "--output", str(tmp_path / "out")])

    assert code == 2
    assert "copy it from the run's folder" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()

    assert main(["--export", str(run), "--output", str(tmp_path / "out")]) == 2
    assert merge(run / "refined/adapter", tmp_path / "out", backbone=run.parent / "model") == 2

    assert capsys.readouterr().err.count("choose another --output") == 2


def test_a_base_loaded_in_bfloat16_is_loaded_so_again(run, tmp_path):
    adapter = shutil.copytree(run / "refined" / "adapter", tmp_path / "adapter")
    backbone = Backbone.load(run.parent / "model", dtype=torch.bfloat16)
    description = json.loads((adapter / DESCRIPTION_FILE).read_text())
    description["base"] |= {"dtype": "bfloat16", "digest": backbone.origin.digest}
    (adapter / DESCRIPTION_FILE).write_text(json.dumps(description))

    assert merge(adapter, tmp_path / "merged", backbone=run.parent / "model") == 0

    name = "patch_embed.proj.weight"
    merged = load_file(tmp_path / "merged" / "model.safetensors")[name]
    assert torch.equal(merged, backbone.vit.state_dict()[name].float())
