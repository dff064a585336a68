import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from backbone import RegisterBorder, is_artifact, load_artifact, save_artifact
from backbone.artifact import weights_digest
from backbone.digest import Origin
from backbone.errors import ArtifactError
from backbone.registers import LearnableBorder
from tests.support import tiny_artifact, tiny_backbone


def test_an_artifact_gives_the_same_tokens_as_what_was_saved(tmp_path):
    backbone = tiny_backbone()
    pixels = torch.randn(2, 3, 48, 80)
    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(seed=3), model_card="# card\n")

    loaded = load_artifact(tmp_path / "a")

    assert torch.equal(loaded.backbone.encode(pixels).tokens, backbone.encode(pixels).tokens)
    assert loaded.manifest.border.seed == 3
    assert (tmp_path / "a" / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch16_dinov3_qkvb", "eva02_base_patch16_clip_224"],
)
def test_timm_alone_loads_the_folder_and_gives_the_same_tokens(tmp_path, name):
    backbone = tiny_backbone(name)
    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(), model_card="")
    pixels = torch.randn(1, 3, 64, 64)

    vit = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()

    tokens = vit.forward_features(pixels)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(tokens, backbone.encode(pixels).tokens)


def test_weights_may_be_stored_in_half_precision(tmp_path):
    tiny_artifact(tmp_path / "a", weights_dtype=torch.float16)

    stored = load_file(tmp_path / "a" / "model.safetensors")

    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    load_artifact(tmp_path / "a")


def test_the_manifest_keeps_everything_that_was_given(tmp_path):
    folder = tiny_artifact(
        tmp_path / "a",
        native_size=(96, 96),
        channel_mask=(1, 5),
        recipe={"optim": {"lr": 1e-4}},
        data={"num_images": 3},
        metrics={"miou": 0.5},
        preview=b"png",
    )

    manifest = load_artifact(folder).manifest

    assert manifest.native_size == (96, 96)
    assert manifest.channel_mask == (1, 5)
    assert manifest.recipe == {"optim": {"lr": 1e-4}}
    assert manifest.data == {"num_images": 3}
    assert manifest.metrics == {"miou": 0.5}
    assert manifest.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (folder / "preview.png").read_bytes() == b"png"


def test_the_origin_of_the_weights_is_kept(tmp_path):
    origin = Origin(source="eva", layout="timm", dtype="bfloat16", digest="0" * 64)
    backbone = tiny_backbone()
    backbone.origin = origin

    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(), model_card="")

    assert load_artifact(tmp_path / "a").manifest.origin == origin
    assert load_artifact(tmp_path / "a").backbone.origin == origin


def test_a_manifest_of_unknown_origin_is_as_older_versions_read_it(tmp_path):
    folder = tiny_artifact(tmp_path / "a")

    assert not {"origin", "evaluations"} & json.loads((folder / "refinery.json").read_text()).keys()
    assert load_artifact(folder).manifest.origin is None
    assert load_artifact(folder).manifest.evaluations == ()


def test_results_of_evaluations_are_kept(tmp_path):
    folder = tiny_artifact(tmp_path / "a", evaluations=[{"task": "depth", "rows": [1.5]}])

    manifest = load_artifact(folder).manifest

    assert manifest.evaluations == ({"task": "depth", "rows": [1.5]},)
    assert manifest.digest == load_artifact(tiny_artifact(tmp_path / "b")).manifest.digest
    _edit_manifest(folder, evaluations=["seventy"])
    with pytest.raises(ArtifactError, match="evaluations"):
        load_artifact(folder)


def test_an_artifact_is_loaded_in_the_precision_asked_for(tmp_path):
    folder = tiny_artifact(tmp_path / "a", weights_dtype=torch.float16)

    exact, rounded = load_artifact(folder), load_artifact(folder, dtype=torch.bfloat16)

    assert {p.dtype for p in exact.backbone.parameters()} == {torch.float32}
    weight, expected = rounded.backbone.vit.norm.weight, exact.backbone.vit.norm.weight
    assert torch.equal(weight, expected.bfloat16())


def test_the_adapter_folder_is_copied(tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    folder = tiny_artifact(tmp_path / "a", adapter=adapter)

    assert (folder / "adapter" / "adapter_config.json").read_text() == "{}"


def test_others_may_read_an_artifact(tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir(mode=0o700)

    folder = tiny_artifact(tmp_path / "a", adapter=adapter)

    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "adapter").stat().st_mode & 0o777 == 0o755
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_changed_weight_is_noticed(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["norm.weight"][0] += 1e-3
    save_file(state, folder / "model.safetensors")

    with pytest.raises(ArtifactError, match="digest"):
        load_artifact(folder)


def test_a_truncated_weights_file_is_named(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        load_artifact(folder)


def _edit_manifest(folder, **changes):
    path = folder / "refinery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_schema_version_is_refused(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    _edit_manifest(folder, schema_version=2)

    with pytest.raises(ArtifactError, match="schema version 2"):
        load_artifact(folder)


def test_unknown_manifest_fields_are_refused(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    _edit_manifest(folder, colour="blue")

    with pytest.raises(ArtifactError, match="colour"):
        load_artifact(folder)


def test_a_manifest_that_contradicts_the_model_is_refused(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    _edit_manifest(folder, patch_size=14)

    with pytest.raises(ArtifactError, match="patch_size is 16 in config.json, 14"):
        load_artifact(folder)


def test_keys_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["surplus"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    _edit_manifest(folder, digest=weights_digest(state))

    with pytest.raises(ArtifactError, match="surplus"):
        load_artifact(folder)


def test_a_folder_without_manifest_is_no_artifact(tmp_path):
    assert not is_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no refinery\.json"):
        load_artifact(tmp_path)


def test_an_older_artifact_is_replaced_and_nothing_else_is_overwritten(tmp_path):
    tiny_artifact(tmp_path / "a", seed=0)
    tiny_artifact(tmp_path / "a", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

    (tmp_path / "notes").mkdir()
    with pytest.raises(ArtifactError, match="is not an artifact"):
        tiny_artifact(tmp_path / "notes")


def test_an_older_artifact_survives_when_its_place_cannot_be_taken(tmp_path, monkeypatch):
    tiny_artifact(tmp_path / "a", seed=0)
    digest = load_artifact(tmp_path / "a").manifest.digest
    rename = type(tmp_path).rename

    def fail_once(path, target):
        if path.name.startswith(".a.") and target.name == "a":
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_once)
    with pytest.raises(OSError, match="no space left"):
        tiny_artifact(tmp_path / "a", seed=1)

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert load_artifact(tmp_path / "a").manifest.digest == digest


def test_weights_beyond_half_precision_are_not_stored_as_infinity(tmp_path):
    backbone = tiny_backbone()
    backbone.vit.norm.weight.data[0] = 1e5

    with pytest.raises(ArtifactError, match=r"norm\.weight are not finite in torch\.float16"):
        save_artifact(
            tmp_path / "a",
            backbone,
            border=RegisterBorder(),
            model_card="",
            weights_dtype=torch.float16,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        tiny_artifact(tmp_path / "a", adapter=tmp_path / "missing")

    assert list(tmp_path.iterdir()) == []


def test_a_learnable_border_travels_with_the_artifact(tmp_path):
    learned = LearnableBorder((96, 96), width=1, patch_size=16)
    torch.nn.init.normal_(learned.patches)
    folder = tiny_artifact(
        tmp_path / "a", border=RegisterBorder(fill="learnable"), learned_border=learned
    )

    loaded = load_artifact(folder)

    border = loaded.manifest.border.pixels((80, 112), 1, loaded.learned_border)
    assert torch.equal(border, learned((80, 112), 1).detach())


def test_a_changed_learnable_border_is_noticed(tmp_path):
    learned = LearnableBorder((96, 96), width=1, patch_size=16)
    folder = tiny_artifact(
        tmp_path / "a", border=RegisterBorder(fill="learnable"), learned_border=learned
    )
    state = load_file(folder / "registers.safetensors")
    save_file(
        {"border.patches": state["border.patches"] + 1},
        folder / "registers.safetensors",
        metadata={"trained_width": "1"},
    )

    with pytest.raises(ArtifactError, match="digest"):
        load_artifact(folder)


def test_unmerged_adapters_are_refused(tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    backbone = tiny_backbone()
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"]), backbone.vit)

    with pytest.raises(ArtifactError, match="not merged"):
        save_artifact(tmp_path / "a", backbone, border=RegisterBorder(), model_card="")
