from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.cache.entry import dump, load
from service.maps import FeatureMap, cached_map, map_key, map_of
from tests.service import feature_maps
from tests.service.feature_maps import encoded_layer, feature_map, noise, regions
from tests.service.plans import plan, served_model

GRID = (2, 3)
MODELS = [served_model(name=name, fingerprint=mark) for name, mark in ("aa", "ba", "ab", "bb")]


def assert_same(one, other):
    assert (one.grid, one.original) == (other.grid, other.original)
    assert len(one.layers) == len(other.layers)
    for left, right in zip(one.layers, other.layers, strict=True):
        for name in ("tokens_NC", "prefix_PC", "registers_RC", "spurious_N2"):
            expected, found = getattr(left, name), getattr(right, name)
            if expected is None:
                assert found is None
                continue
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_map_comes_back_from_its_entry_bit_for_bit(dtype, num_layers):
    layers = [encoded_layer(GRID, seed=seed, dtype=dtype) for seed in range(num_layers)]
    features = feature_map(GRID, layers=layers)

    assert_same(FeatureMap.from_entry(features.to_entry()), features)


@pytest.mark.parametrize("has_registers", [True, False])
@pytest.mark.parametrize("has_spurious", [True, False])
def test_what_was_asked_for_beside_the_tokens_comes_back_too(has_registers, has_spurious):
    layers = [
        encoded_layer(
            GRID,
            seed=seed,
            dtype=torch.bfloat16,
            registers_RC=noise(14, 4, seed=seed, dtype=torch.bfloat16) if has_registers else None,
            spurious_N2=noise(6, 2, seed=seed) if has_spurious else None,
        )
        for seed in range(2)
    ]
    features = feature_map(GRID, layers=layers)

    assert_same(FeatureMap.from_entry(features.to_entry()), features)


def test_a_map_survives_the_bytes_that_replicas_share():
    layer = encoded_layer(GRID, dtype=torch.bfloat16, spurious_N2=noise(6, 2))
    features = feature_map(GRID, layers=[layer])

    entry = load(dump(features.to_entry(), "key"), "key")

    assert_same(FeatureMap.from_entry(entry), features)


def test_a_map_without_prefix_tokens_comes_back():
    features = feature_map(GRID, layers=[encoded_layer(GRID, prefix_PC=torch.zeros(0, 4))])

    assert FeatureMap.from_entry(features.to_entry()).layers[0].prefix_PC.shape == (0, 4)


def test_boxes_are_not_cached():
    boxes = regions((0, 0, 1, 1))
    layer = encoded_layer(GRID, boxes_VC=noise(1, 4))
    features = feature_map(GRID, layers=[layer], regions=boxes)

    entry = features.to_entry()
    cached = FeatureMap.from_entry(entry)

    assert set(entry.tensors) == {"0.tokens", "0.prefix"}
    assert (cached.layers[0].boxes_VC, cached.regions) == (None, None)


def test_the_map_of_an_encoded_image_shares_its_tensors():
    layer = encoded_layer(GRID)
    encoded = SimpleNamespace(layers=(layer,), grid=GRID)

    features = map_of(encoded, (80, 112), None)

    assert features.layers[0].tokens_NC is layer.tokens_NC
    assert (features.grid, features.original) == (GRID, (80, 112))
    assert features.to_entry().tensors["0.tokens"] is layer.tokens_NC


sizes = st.tuples(*[st.sampled_from([1, 11, 16, 161, 116])] * 2)
layers = st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True).map(tuple)
wanted = st.tuples(
    st.sampled_from(["a", "b", "a\nb"]),  # the image
    st.sampled_from(MODELS),
    sizes,
    layers,
    st.sampled_from([0, 1, 11]),
    st.booleans(),
    st.booleans(),
)


def key_of(digest, model, size, layers, width, registers, spurious):
    made = plan(size, layers, model, width, registers=registers, spurious=spurious)
    return map_key(digest, made)


def decisive(digest, model, *others):
    """All that decides a map: of the model its fingerprint, not its name."""
    return digest, model.fingerprint, *others


@given(one=wanted, other=wanted, keeps=st.lists(st.booleans(), min_size=7, max_size=7))
def test_two_images_share_a_key_exactly_when_all_that_decides_their_maps_is_equal(
    one, other, keeps
):
    # Most pairs differ in a few things only: those are the ones that could be confused.
    other = tuple(a if keep else b for a, b, keep in zip(one, other, keeps, strict=True))

    assert (key_of(*one) == key_of(*other)) == (decisive(*one) == decisive(*other))


@pytest.mark.parametrize(
    "change",
    [
        {"size": (32, 48)},
        {"size": (48, 32)},
        {"layers": (11, 5)},
        {"layers": (5,)},
        {"register_width": 2},
        {"registers": True},
        {"spurious": True},
        {"model": served_model(fingerprint="another")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_wish_alone_changes_the_key(change):
    made = plan(layers=(5, 11))

    assert map_key("a", replace(made, **change)) != map_key("a", made)


def test_a_key_is_the_same_in_every_process():
    digest, model = "0" * 64, served_model(fingerprint="f" * 64)

    assert map_key(digest, plan(model=model)) == (
        "74c9995795417bf8cdcee507ab1a682bf5c76af7332e722e3fe8807a62dc304b"
    )


PLAN = plan(size=(32, 48), layers=(5, 11), model=feature_maps.MODEL)


def entry_of(**metadata):
    """An entry of `PLAN`, with other metadata."""
    entry = feature_map(GRID, layers=[encoded_layer(GRID, seed=seed) for seed in (0, 1)]).to_entry()
    return replace(entry, metadata=entry.metadata | metadata)


def test_a_cached_map_is_known_by_its_plan():
    assert cached_map(entry_of(), PLAN) is not None
    assert cached_map(entry_of(), replace(PLAN, layers=(11,))) is None
    assert cached_map(entry_of(), replace(PLAN, size=(48, 32))) is None
    assert cached_map(entry_of(), replace(PLAN, registers=True)) is None
    assert cached_map(entry_of(), replace(PLAN, spurious=True)) is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"layers": "3"},
        {"layers": "x"},
        {"layers": "9" * 5000},
        {"grid": "[0, 6]"},
        {"grid": '"ab"'},
        {"grid": "[Infinity, 2]"},
        {"grid": "[" * 100_000},
        {"grid": "{"},
        {"original": "[0, 0]"},
        {"original": "7"},
    ],
)
def test_metadata_of_another_program_are_no_map(metadata):
    assert cached_map(entry_of(**metadata), PLAN) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("0.tokens", None),
        ("1.tokens", noise(5, 4)),
        ("1.tokens", noise(6)),
        ("0.prefix", noise(1, 3)),
        ("0.prefix", noise(4)),
        ("0.registers", noise(14, 4)),
        ("1.spurious", noise(6, 2)),
    ],
)
def test_tensors_of_another_program_are_no_map(name, part):
    entry = entry_of()
    tensors = {key: value for key, value in entry.tensors.items() if key != name}

    changed = replace(entry, tensors=tensors | ({} if part is None else {name: part}))

    assert cached_map(changed, PLAN) is None
