import functools

import pytest
import timm
import torch

from backbone import Backbone
from backbone.catalog import CATALOG, find
from backbone.errors import ModelNotFoundError

# Millions of parameters of the vision towers, as their cards and papers have them.
PARAMETERS = {
    "dinov2-s": 22.1,
    "dinov2-b": 86.6,
    "dinov2-l": 304.4,
    "dinov2-g": 1136.5,
    "dinov3-s": 21.6,
    "dinov3-s-plus": 28.7,
    "dinov3-b": 85.6,
    "dinov3-l": 303.1,
    "dinov3-h-plus": 840.5,
    "dinov3-7b": 6716.0,
    "siglip2-so400m": 428.8,
    "siglip2-giant": 1163.7,
    "eva-clip-8b-448": 7524.0,
    "eva-clip-18b": 17622.6,
    "internvit-6b-448-v2.5": 5536.5,
    "internvit-300m": 304.0,
    "rice-l-560": 302.9,
    "laion-g": 1011.2,
    "openai-clip-b": 85.8,
    "openai-clip-l": 303.5,
    "eva02-clip-b": 85.9,
    "eva02-clip-l": 303.6,
    "aimv2-l": 310.0,
    "aimv2-h": 682.0,
    "aimv2-1b": 1236.5,
    "aimv2-3b": 2723.0,
    "pe-spatial-t": 5.7,
    "pe-spatial-l": 304.0,
    "pe-spatial-g": 1851.9,
    "c-radio-v3-b": 86.5,
    "c-radio-v3-h": 632.0,
    "c-radio-v4-so400m": 413.5,
}


def by_size(names):
    """A model of many blocks takes a second to build, even without memory."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (CATALOG[n].depth > 24)) for n in names]


@functools.cache
def built(name):
    with torch.device("meta"):
        return CATALOG[name].build()


@pytest.mark.parametrize("name", by_size(CATALOG))
def test_an_entry_says_what_its_model_is(name):
    entry, model = CATALOG[name], built(name)
    block = model.blocks[0]

    assert len(model.blocks) == entry.depth
    assert model.embed_dim == entry.width
    assert block.attn.num_heads == entry.heads
    assert block.mlp.fc2.in_features == entry.hidden
    assert model.patch_embed.patch_size == (entry.patch, entry.patch)
    assert model.patch_embed.img_size == (entry.native_size, entry.native_size)
    assert model.num_prefix_tokens == entry.prefix
    assert model.pretrained_cfg["mean"] == entry.mean
    assert model.pretrained_cfg["std"] == entry.std
    has_norm = not isinstance(model.norm, torch.nn.Identity)
    assert has_norm != ("no final norm" in entry.notes)
    Backbone(model, name=name).grid(entry.size, entry.size)  # whole patches


@pytest.mark.parametrize("name", by_size(PARAMETERS))
def test_parameters_are_as_many_as_published(name):
    num_parameters = sum(p.numel() for p in built(name).parameters())

    assert num_parameters / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)


@pytest.mark.parametrize("name", [n for n, e in CATALOG.items() if e.timm])
def test_timm_has_the_weights_that_an_entry_names(name):
    entry = CATALOG[name]

    config = timm.get_pretrained_cfg(entry.timm)

    assert config is not None
    assert config.hf_hub_id == entry.hub[0]
    assert config.mean == entry.mean


def test_what_the_authors_recipes_say():
    # Resolution, image tokens per register token, layers of the attention filter.
    assert {
        name: (CATALOG[name].size, CATALOG[name].r_reg, CATALOG[name].hijack_layers)
        for name in (
            "dinov2-g",
            "siglip2-so400m",
            "siglip2-giant",
            "eva-clip-8b-448",
            "internvit-6b-224",
            "laion-g",
            "rice-l-560",
        )
    } == {
        "dinov2-g": (518, 37, None),
        "siglip2-so400m": (512, 32, (10, 15)),
        "siglip2-giant": (512, 32, (20, 25)),
        "eva-clip-8b-448": (448, 32, (10, 15)),
        "internvit-6b-224": (448, 32, (29, 31)),
        "laion-g": (448, 32, None),
        "rice-l-560": (560, 32, (9, 11)),
    }
    raw = {name for name, entry in CATALOG.items() if not entry.dense_norm}
    assert raw >= {"eva-clip-8b-448", "eva-clip-18b", "internvit-6b-224", "rice-l-560"}
    assert not raw & {"dinov2-g", "siglip2-so400m", "siglip2-giant", "laion-g"}


def test_only_the_checkpoint_of_48_blocks_loses_its_last_three():
    assert CATALOG["internvit-6b-224"].model_args == {"depth": 45}
    assert CATALOG["internvit-6b-224"].dropped_blocks == 3
    assert [n for n, e in CATALOG.items() if e.dropped_blocks] == ["internvit-6b-224"]


def test_entries_are_found_by_every_name_they_have():
    so400m = CATALOG["siglip2-so400m"]

    assert find("siglip2-so400m") is so400m
    assert find("vit_so400m_patch16_siglip_512.v2_webli") is so400m
    assert find("rice_large_patch14_560") is CATALOG["rice-l-560"]
    assert find("vit_so400m_patch16_siglip_512") is None  # of other weights, maybe
    assert find("none") is None


def test_our_constructors_are_registered_with_timm():
    ours = set(timm.list_models(module="architectures"))

    assert ours == {e.constructor for e in CATALOG.values() if e.constructor}


def test_a_catalogue_name_loads_and_a_misspelt_one_gets_a_suggestion():
    assert Backbone.load("dinov3-s", random_weights=True).embed_dim == 384
    with pytest.raises(ModelNotFoundError, match=r"did you mean.*siglip2-so400m"):
        Backbone.load("siglip2-so400", random_weights=True)
