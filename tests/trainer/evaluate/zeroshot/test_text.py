import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.trainer.evaluate.zeroshot import towers
from trainer.evaluate.zeroshot import ZeroshotError, find_tower, open_text_tower
from trainer.evaluate.zeroshot.sources import TOKENIZER_FILES

PROMPTS = ["a photo of a cat.", "a dog", "A sofa, or: two!"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def embedded(found):
    return F.normalize(found.detach(), dim=-1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, towers.write_clip(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return folder, towers.write_siglip(folder)


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eva-clip")
    return folder, *towers.write_eva_clip(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    towers.write_clip_tokenizer(folder)
    return folder


def test_clips_embeddings_are_transformers_text_features(clip, tokenizer):
    from transformers import CLIPTokenizer

    folder, model = clip
    inputs = CLIPTokenizer.from_pretrained(tokenizer)(PROMPTS, padding=True, return_tensors="pt")

    tower = open_text_tower(find_tower(str(folder)))

    expected = embedded(model.get_text_features(**inputs).pooler_output)
    torch.testing.assert_close(tower.embed(PROMPTS), expected, **CLOSE)
    assert (tower.family, tower.dim) == ("clip", towers.DIM)
    assert tower.scale == pytest.approx(model.logit_scale.exp().item())
    assert tower.tokenize(PROMPTS).shape == (3, towers.LENGTH)


def test_a_text_tower_alone_is_enough(clip, tmp_path):
    from transformers import CLIPTextModelWithProjection

    folder, _ = clip
    alone = CLIPTextModelWithProjection.from_pretrained(folder)
    towers.save(alone, tmp_path)
    towers.write_clip_tokenizer(tmp_path)

    found = open_text_tower(find_tower(str(tmp_path)))

    expected = open_text_tower(find_tower(str(folder)))
    torch.testing.assert_close(found.embed(PROMPTS), expected.embed(PROMPTS), **CLOSE)
    assert found.digest == expected.digest


def test_siglips_embeddings_are_transformers_text_features(siglip):
    folder, model = siglip
    tower = open_text_tower(find_tower(str(folder)))

    tokens = tower.tokenize(["A Photo."])  # in lower case, without punctuation, padded to the end
    numbers = [towers.SIGLIP_VOCABULARY.index(letter) for letter in "aphoto"]
    unknown = towers.SIGLIP_VOCABULARY.index("<unk>")  # the space
    end, padding = (towers.SIGLIP_VOCABULARY.index(name) for name in ("</s>", "<pad>"))
    expected_tokens = [numbers[0], unknown, *numbers[1:], end]
    assert tokens[0].tolist() == expected_tokens + [padding] * (towers.LENGTH - 8)

    expected = embedded(model.get_text_features(tower.tokenize(PROMPTS)).pooler_output)
    torch.testing.assert_close(tower.embed(PROMPTS), expected, **CLOSE)
    assert (tower.family, tower.dim) == ("siglip", 32)


def test_eva_clip_is_read_without_running_its_code(eva, tokenizer):
    folder, _, text = eva
    tower = open_text_tower(find_tower(str(folder), tokenizer=str(tokenizer)))

    expected = embedded(text(tower.tokenize(PROMPTS)).text_embeds)
    torch.testing.assert_close(tower.embed(PROMPTS), expected, **CLOSE)
    assert tower.scale == pytest.approx(torch.tensor(3.0).exp().item())


def test_eva_clips_own_file_is_the_same_tower(eva, tokenizer, tmp_path):
    folder, vision, _ = eva
    names = towers.in_original_names(load_file(folder / "model.safetensors"))
    names |= vision.in_the_authors_names()
    # Of the reference, a part that is too small to be a tower.
    names["text.ln_final.weight"] = load_file(folder / "model.safetensors")[
        "text_model.final_layer_norm.weight"
    ]
    torch.save(names, tmp_path / "EVA.pt")

    found = open_text_tower(find_tower(str(tmp_path / "EVA.pt"), tokenizer=str(tokenizer)))

    expected = open_text_tower(find_tower(str(folder), tokenizer=str(tokenizer)))
    torch.testing.assert_close(found.embed(PROMPTS), expected.embed(PROMPTS), **CLOSE)


def test_openclips_configuration_says_which_activation_a_file_has(eva, tokenizer, tmp_path):
    # OpenAI's weights in OpenCLIP's names have QuickGELU, and no tensor says so.
    tensors = towers.in_original_names(load_file(eva[0] / "model.safetensors"))
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    spec, given = str(tmp_path / "open_clip_model.safetensors"), {"tokenizer": str(tokenizer)}
    plain = open_text_tower(find_tower(spec, **given))
    configuration = tmp_path / "open_clip_config.json"

    configuration.write_text('{"model_cfg": {"embed_dim": 8}}')
    same = open_text_tower(find_tower(spec, **given))
    configuration.write_text('{"model_cfg": {"quick_gelu": true}}')
    quick = open_text_tower(find_tower(spec, **given))

    assert torch.equal(same.embed(PROMPTS), plain.embed(PROMPTS))
    assert not torch.allclose(quick.embed(PROMPTS), plain.embed(PROMPTS), atol=1e-4)
    assert quick.digest == plain.digest
    assert quick.key != plain.key == same.key, "embeddings on disk must not be taken for the other"


def test_longer_texts_end_where_the_tower_does(clip):
    tower = open_text_tower(find_tower(str(clip[0])))

    tokens = tower.tokenize(["word " * 40])

    assert tokens.shape == (1, towers.LENGTH)
    assert tokens[0, -1] == len(towers.CLIP_VOCABULARY)  # the end is kept


def copy(folder, target, *, without=(), tensors=None, config=None):
    for path in folder.iterdir():
        if path.is_file() and path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())
    if tensors is not None:
        save_file(tensors, target / "model.safetensors")
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    return str(target)


def refusal(spec, **options):
    with pytest.raises(ZeroshotError) as caught:
        open_text_tower(find_tower(spec, **options))
    return str(caught.value)


def test_what_is_missing_is_said(clip, siglip, tmp_path):
    folder, _ = clip
    tensors = load_file(folder / "model.safetensors")

    def target(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    spec = copy(folder, target("a"), without=TOKENIZER_FILES)
    assert "--tokenizer. All CLIP and EVA-CLIP models read" in refusal(spec)
    spec = copy(siglip[0], target("b"), without=TOKENIZER_FILES)
    assert "has no tokenizer.json" in refusal(spec)
    spec = copy(folder, target("c"), without=["config.json"])
    assert "without config.json" in refusal(spec)
    vision = {key: value for key, value in tensors.items() if "vision" in key}
    spec = copy(folder, target("d"), tensors=vision)
    assert "as DINOv2 and DINOv3" in refusal(spec)
    cut = {
        key: value for key, value in tensors.items() if "text_model.encoder.layers.1.mlp" not in key
    }
    spec = copy(folder, target("e"), tensors=cut)
    assert "4 missing keys, the first" in refusal(spec)
    bare = {key: value for key, value in tensors.items() if key != "text_projection.weight"}
    spec = copy(folder, target("f"), tensors=bare)
    assert "without its projection" in refusal(spec)
    (target("g") / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refusal(str(folder), tokenizer=str(tmp_path / "g"))


def test_another_models_tokenizer_is_refused(clip, tmp_path):
    from transformers import CLIPTokenizer

    numbers = {**towers.clip_numbers(), **{f"word{n}": 1000 + n for n in range(3)}}
    numbers["<|endoftext|>"] = 2000
    CLIPTokenizer(vocab=numbers, merges=[]).save_pretrained(tmp_path)

    assert "give its own with --tokenizer" in refusal(str(clip[0]), tokenizer=str(tmp_path))


def test_what_is_not_here_is_said(tmp_path):
    assert "nor the id of a Hugging Face repository" in refusal(str(tmp_path / "nothing" / "here"))
    assert "hf download nobody/nothing" in refusal("nobody/nothing")
    towers.write_clip(tmp_path)
    assert "hf download nobody/tokens" in refusal(str(tmp_path), tokenizer="nobody/tokens")
    assert "neither a folder nor the id" in refusal(str(tmp_path), tokenizer="no such folder")
