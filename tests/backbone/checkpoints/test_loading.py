import json
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbone import Backbone, catalog
from backbone.catalog import Entry
from backbone.checkpoints import fill, find_plan, open_checkpoint
from backbone.digest import weights_digest
from backbone.errors import ModelError, ModelNotFoundError
from tests.backbone.checkpoints.eva_clip_reference import EvaClipReference
from tests.backbone.checkpoints.published import CASES, OURS, tensors_of

NAME = "eva-clip-8b-448"


class TinyEntry(Entry):
    @property
    def model_args(self):
        return {"img_size": 56, **OURS}


@pytest.fixture(autouse=True)
def tiny_catalogue(monkeypatch):
    """The catalogue's EVA-CLIP, two blocks of 32 channels."""
    entry = catalog.CATALOG[NAME]
    fields = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    monkeypatch.setattr(catalog, "CATALOG", {NAME: TinyEntry(**fields)})


def published(seed=0):
    torch.manual_seed(seed)
    reference = EvaClipReference().eval()
    return reference, {key: value.contiguous() for key, value in reference.state_dict().items()}


def write_shards(folder, tensors, num_shards=3, kind="safetensors"):
    """Shards as the hub has them: any tensor in any, so that q, k and v are torn apart."""
    folder.mkdir(exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(num_shards):
        part = {k: v for i, (k, v) in enumerate(tensors.items()) if i % num_shards == number}
        name = f"{stem}-{number + 1:05}-of-{num_shards:05}.{kind}"
        if kind == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(tmp_path, kind):
    reference, tensors = published()
    folder = write_shards(tmp_path / "shards", tensors, kind=kind)
    pixels = torch.randn(1, 3, 56, 56)

    backbone = Backbone.load(NAME, weights=folder)

    with torch.no_grad():
        tokens, expected = backbone.encode(pixels).tokens, reference(pixels)[:, 1:]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    index = next(folder.glob("*.index.json"))
    by_index = Backbone.load(NAME, weights=index).vit.state_dict()
    assert weights_digest(by_index) == weights_digest(backbone.vit.state_dict())


def test_parts_of_one_tensor_may_lie_in_several_files(tmp_path):
    case = CASES["dinov2-registers"]
    case.write(tmp_path / "whole")
    whole = case.read(tmp_path / "whole").vit.state_dict()
    folder = write_shards(tmp_path / "torn", tensors_of(tmp_path / "whole"), num_shards=5)

    torn = case.read(folder).vit.state_dict()

    assert weights_digest(torn) == weights_digest(whole)


def test_the_catalogue_decides_the_dense_norm_unless_told(tmp_path):
    folder = write_shards(tmp_path / "shards", published()[1])

    assert Backbone.load(NAME, weights=folder).dense_norm is False
    assert Backbone.load(NAME, weights=folder, dense_norm=True).dense_norm is True
    assert Backbone.load("vit_tiny_patch16_224", random_weights=True).dense_norm is True


def test_weights_are_read_in_the_precision_asked_for(tmp_path):
    folder = write_shards(tmp_path / "shards", published()[1])
    exact = Backbone.load(NAME, weights=folder).vit.state_dict()

    backbone = Backbone.load(NAME, weights=folder, dtype=torch.bfloat16)

    for name, value in backbone.vit.state_dict().items():
        assert torch.equal(value, exact[name].bfloat16()), name
    assert backbone.encode(torch.randn(1, 3, 56, 56).bfloat16()).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loaded_weights_hold_on_to_no_file(tmp_path, kind):
    folder = write_shards(tmp_path / "shards", published()[1], kind=kind)
    backbone = Backbone.load(NAME, weights=folder)

    for path in folder.glob(f"*.{kind}"):
        with path.open("r+b") as file:  # in place, as a copy over it would
            file.write(b"\xff" * path.stat().st_size)

    assert weights_digest(backbone.vit.state_dict()) == backbone.origin.digest


def test_random_weights_are_drawn_in_the_precision_asked_for():
    backbone = Backbone.load("vit_tiny_patch16_224", random_weights=True, dtype=torch.bfloat16)

    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_where_the_weights_are_from_is_recorded(tmp_path):
    folder = write_shards(tmp_path / "EVA-CLIP", published()[1])

    backbone = Backbone.load(NAME, weights=folder, dtype=torch.bfloat16)

    assert backbone.origin.source == "EVA-CLIP"
    assert backbone.origin.layout == "transformers EVA-CLIP"
    assert backbone.origin.dtype == "bfloat16"
    assert backbone.origin.digest == weights_digest(backbone.vit.state_dict())
    assert Backbone.load(NAME, random_weights=True).origin is None


def test_rotary_frequencies_are_there_after_loading(tmp_path):
    name = "vit_small_patch16_dinov3_qkvb"
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0).eval()
    save_file(vit.state_dict(), tmp_path / "dinov3.safetensors")
    pixels = torch.randn(1, 3, 64, 96)

    backbone = Backbone.load(name, weights=tmp_path / "dinov3.safetensors")

    with torch.no_grad():
        expected = vit.forward_features(pixels)[:, 5:]
        torch.testing.assert_close(backbone.encode(pixels).tokens, expected)
    assert not any(tensor.is_meta for tensor in backbone.buffers())


def test_a_truncated_shard_is_named(tmp_path):
    for kind in ("safetensors", "bin"):
        folder = write_shards(tmp_path / kind, published()[1], kind=kind)
        path = sorted(folder.glob(f"*00002*.{kind}"))[0]
        path.write_bytes(path.read_bytes()[:-500])

        with pytest.raises(ModelError, match=rf"{re.escape(path.name)} cannot be read.*truncated"):
            Backbone.load(NAME, weights=folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "shards", published()[1])
    (folder / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors is named by the"):
        Backbone.load(NAME, weights=folder)


def test_a_shard_of_the_text_tower_alone_may_be_missing(tmp_path):
    folder = write_shards(tmp_path / "shards", published()[1])
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= {"text_model.embeddings.weight": "model-of-text.safetensors"}
    index.write_text(json.dumps(content))

    assert Backbone.load(NAME, weights=folder).embed_dim == 32


def test_a_shard_without_a_key_of_the_index_is_named(tmp_path):
    _, tensors = published()
    folder = write_shards(tmp_path / "shards", tensors, num_shards=1)
    key = "vision_model.encoder.layers.1.mlp.fc1.bias"
    del tensors[key]
    save_file(tensors, folder / "model-00001-of-00001.safetensors")

    with pytest.raises(ModelError, match=rf"00001\.safetensors has no {re.escape(key)} \(1 keys"):
        Backbone.load(NAME, weights=folder)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))

    with pytest.raises(ModelError, match=r"names \.\./other\.safetensors"):
        Backbone.load(NAME, weights=tmp_path)

    index.write_text("[]")
    with pytest.raises(ModelError, match="is not the index of a sharded checkpoint"):
        Backbone.load(NAME, weights=tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    _, tensors = published()
    tensors["vision_model.encoder.layers.1.mlp.fc2.weight"] = torch.zeros(32, 100)
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(
        ModelError,
        match=r"model\.safetensors: vision_model\.encoder\.layers\.1\.mlp\.fc2\.weight \[32, 100\]"
        r".*eva_clip_8b_patch14_448 has \[32, 160\]",
    ):
        Backbone.load(NAME, weights=tmp_path)


def test_a_key_too_few_and_one_too_many_are_named(tmp_path):
    _, tensors = published()
    path = tmp_path / "model.safetensors"
    removed = tensors.pop("vision_model.encoder.layers.0.self_attn.k_proj.weight")
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"lacks 1 keys.*self_attn\.k_proj\.weight, needed for .*\[32, 32\]"
    ):
        Backbone.load(NAME, weights=path)

    tensors["vision_model.encoder.layers.0.self_attn.k_proj.weight"] = removed
    tensors["vision_model.encoder.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"model\.safetensors.*has 1 keys.*self_attn\.q_proj\.bias of \[32\]"
    ):
        Backbone.load(NAME, weights=path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match=r"model\.safetensors.*lacks \d+ keys"):
        Backbone.load(NAME, weights=tmp_path / "model.safetensors")


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    path = tmp_path / "EVA_CLIP.pt"
    torch.save({"module": {"visual.cls_token": torch.zeros(1)}, "extra": Surprise()}, path)

    with pytest.raises(ModelError, match=r"EVA_CLIP\.pt is damaged, or holds more than tensors"):
        Backbone.load(NAME, weights=path)

    path.write_bytes(pickle.dumps(Surprise(), protocol=2))
    with pytest.raises(ModelError, match=r"EVA_CLIP\.pt"):
        Backbone.load(NAME, weights=path)
    assert "code ran" not in capsys.readouterr().out


def test_pytorchs_older_format_is_read(tmp_path):
    reference, _ = published()
    path = tmp_path / "EVA_CLIP.pt"
    tensors = reference.in_the_authors_names()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)

    backbone = Backbone.load(NAME, weights=path)

    assert torch.equal(backbone.vit.cls_token, tensors["visual.cls_token"])


def test_biases_of_dinov3_may_be_left_out_when_they_are_zero(tmp_path):
    case = CASES["dinov3"]
    model = case.write(tmp_path / "one")
    name = "vit_small_patch16_dinov3"
    biases = [p for n, p in model.named_parameters() if "q_proj.bias" in n or "v_proj.bias" in n]
    changes = {"img_size": 64, **OURS}

    def load(folder):
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0, **changes).eval()
        checkpoint = open_checkpoint(folder)
        plan = find_plan(vit, checkpoint, model=name)
        fill(vit, checkpoint, plan, model=name, dtype=torch.float32)
        return Backbone(vit, name=name)

    with pytest.raises(ModelError, match=r"q_proj\.bias is not zero"):
        load(tmp_path / "one")

    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    model.save_pretrained(tmp_path / "two")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = load(tmp_path / "two").encode(pixels).tokens
    torch.testing.assert_close(tokens, case.features(model, pixels), rtol=0, atol=1e-5)


def test_a_folder_without_weights_says_what_would_be_read(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no weights: none of model\.safetensors"):
        Backbone.load(NAME, weights=tmp_path)


def test_a_folder_of_transformers_is_not_taken_for_timms(tmp_path):
    CASES["dinov2"].write(tmp_path)

    with pytest.raises(
        ModelError, match="is not in timm's format.*give this folder as its weights"
    ):
        Backbone.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.replace("blocks.7.", "other."), "lacks 12 of the tensors of .*blocks.7"),
        (lambda key: key.replace("blocks.11.", "blocks.12."), "lacks 12 of the tensors"),
        (None, "1 tensors of blocks that vit_tiny_patch16_224 has no place for.*blocks.12"),
    ],
)
def test_what_timm_converts_is_complete_too(tmp_path, change, message):
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()
    if change is None:
        state["blocks.12.norm1.weight"] = torch.ones(192)
    else:
        state = {change(key): value for key, value in state.items()}
    save_file(state, tmp_path / "other.safetensors")

    with pytest.raises(ModelError, match=message):
        Backbone.load("vit_tiny_patch16_224", weights=tmp_path / "other.safetensors")


def test_weights_in_whole_numbers_are_refused(tmp_path):
    tensors = published()[1]
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file(tensors | {key: tensors[key].to(torch.int8)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match=r"fc1\.weight.*torch\.int8.*quantised"):
        Backbone.load(NAME, weights=tmp_path / "model.safetensors")


# What the unpickler makes of them: IndexError, KeyError.
@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02h\x07."])
def test_a_damaged_pickle_is_named_whatever_it_raises(tmp_path, content):
    (tmp_path / "weights.bin").write_bytes(content)

    with pytest.raises(ModelError, match=r"weights\.bin cannot be read"):
        open_checkpoint(tmp_path / "weights.bin")
