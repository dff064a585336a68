import numpy as np
import pytest
import torch

from backbone import DenseFeatures
from service.boxes import align
from service.errors import FeatureOverflowError, InvalidOptionError
from service.finishing import finish, num_more_values, num_values, pooled
from service.options import FeatureOptions
from tests.service.feature_maps import encoded_layer, feature_map, noise, regions

GRID = (2, 3)
NUMPY = {"float16": np.float16, "float32": np.float32}
BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.55, 0.9), (0.5, 0.5, 0.5, 0.5), (-0.3, -0.2, 0.4, 1.3))


def parts_of(features=None, boxes=None, index=0, **options):
    """The tensors of an image by kind, and by layer where there are several."""
    features = features or feature_map(GRID)
    finished = finish(features, boxes, FeatureOptions(**options), index=index)
    one = len(features.layers) == 1
    named = {part.kind if one else (part.kind, part.layer): part.tensor for part in finished.parts}
    assert len(named) == len(finished.parts)
    assert all(tensor.is_contiguous() for tensor in named.values())
    return named


def features_of(features=None, boxes=None, **options):
    return parts_of(features, boxes, **options)["features"]


def tokens_of(features):
    return features.layers[0].tokens_NC


def map_of_tokens(tokens_NC, grid=GRID):
    layer = encoded_layer(grid, channels=tokens_NC.shape[1], tokens_NC=tokens_NC)
    return feature_map(grid, layers=[layer])


# --- numbers and shapes


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_their_values_in_every_layout(dtype, source_dtype):
    features = feature_map(GRID, dtype=source_dtype)
    expected = tokens_of(features).float().numpy().astype(NUMPY[dtype])

    def array(layout):
        return features_of(features, dtype=dtype, layout=layout).numpy()

    np.testing.assert_array_equal(array("tokens"), expected)
    np.testing.assert_array_equal(array("grid"), expected.reshape(2, 3, 4))
    np.testing.assert_array_equal(
        array("nchw"), expected.reshape(2, 3, 4).transpose(2, 0, 1)[np.newaxis]
    )
    assert array("nchw").dtype == NUMPY[dtype]
    assert array("nchw").flags["C_CONTIGUOUS"]


def test_bfloat16_is_what_the_model_computed():
    features = feature_map(GRID, dtype=torch.bfloat16)

    sent = features_of(features, dtype="bfloat16", layout="tokens")

    assert sent.dtype == torch.bfloat16
    assert sent.data_ptr() == tokens_of(features).data_ptr(), "it is sent without a copy"


def test_normalised_tokens_have_unit_length():
    sent = features_of(normalize=True, dtype="float32", layout="tokens")

    np.testing.assert_allclose(np.linalg.norm(sent, axis=-1), 1.0, rtol=1e-6)


def test_a_token_of_zeros_stays_zeros_when_it_is_normalised():
    sent = features_of(map_of_tokens(torch.zeros(6, 4)), normalize=True)

    assert not bool(sent.any())


def test_every_layer_is_finished_alike():
    layers = [encoded_layer(GRID, seed=seed) for seed in range(3)]

    parts = parts_of(feature_map(GRID, layers=layers), dtype="float32", layout="tokens")

    assert list(parts) == [("features", 0), ("features", 1), ("features", 2)]
    for number, layer in enumerate(layers):
        torch.testing.assert_close(parts["features", number], layer.tokens_NC, rtol=0, atol=0)


# --- values that a dtype cannot hold


def test_values_beyond_float16_are_refused_and_not_sent_as_infinity():
    huge = noise(6, 4)
    huge[2, 1] = 1e6
    features = map_of_tokens(huge)

    with pytest.raises(FeatureOverflowError, match=r"image 3.*float16.*float32") as caught:
        parts_of(features, index=3)

    assert caught.value.index == 3
    assert features_of(features, dtype="float32").max() == 1e6
    assert features_of(features, dtype="bfloat16").max() > 9e5
    assert features_of(features, normalize=True).max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"pool": 2}, {"project": 2}])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_values_that_are_not_finite_are_refused_in_every_dtype(value, options, dtype):
    broken = noise(6, 4)
    broken[2, 1] = value

    with pytest.raises(FeatureOverflowError, match="image 5") as caught:
        parts_of(map_of_tokens(broken), dtype=dtype, index=5, **options)

    assert caught.value.index == 5


def test_what_is_included_is_checked_too():
    layer = encoded_layer(GRID, prefix_PC=torch.full((1, 4), 1e6))

    with pytest.raises(FeatureOverflowError):
        parts_of(feature_map(GRID, layers=[layer]), include=("cls",))


# --- pooling


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 1), (3, 2)])
@pytest.mark.parametrize("factor", [2, 3, 64])
def test_pooling_by_a_factor_averages_squares_that_are_cut_off_at_the_edges(grid, factor):
    features = feature_map(grid)
    tokens = tokens_of(features).numpy().reshape(*grid, 4)

    options = FeatureOptions(pool=factor, dtype="float32")
    finished = finish(features, None, options, index=0)

    expected = np.array(
        [
            [tokens[y : y + factor, x : x + factor].mean((0, 1)) for x in range(0, grid[1], factor)]
            for y in range(0, grid[0], factor)
        ]
    )
    np.testing.assert_allclose(finished.parts[0].tensor, expected, rtol=1e-5, atol=1e-6)
    assert finished.grid == expected.shape[:2]
    assert finished.pool == (factor, factor)


@pytest.mark.parametrize("layout", ["grid", "tokens", "nchw"])
def test_the_mean_over_all_patches_is_one_vector_in_every_layout(layout):
    features = feature_map(GRID)

    options = FeatureOptions(pool="mean", layout=layout, dtype="float32")
    finished = finish(features, None, options, index=0)

    expected = tokens_of(features).numpy().mean(axis=0)
    np.testing.assert_allclose(finished.parts[0].tensor, expected, rtol=1e-5, atol=1e-6)
    assert (finished.grid, finished.pool) == ((1, 1), (2.0, 3.0))


@pytest.mark.parametrize("pool", ["none", 1])
def test_pooling_by_one_patch_is_none(pool):
    tokens_NC = noise(6, 4, dtype=torch.bfloat16)

    found, grid, cell = pooled(tokens_NC, GRID, pool)

    assert found is tokens_NC
    assert (grid, cell) == (GRID, (1.0, 1.0))


def test_averages_are_computed_in_float32():
    tokens_NC = torch.full((300, 1), 1.0).bfloat16()
    tokens_NC[0] = 256.0  # in bfloat16 adding 1 to it changes nothing

    (mean,), _, _ = pooled(tokens_NC, (1, 300), "mean")

    assert float(mean) == pytest.approx(555 / 300)


@pytest.mark.parametrize("layout", ["grid", "tokens", "nchw"])
def test_pooled_patches_have_the_layout_asked_for(layout):
    shape = {"grid": (2, 3, 4), "tokens": (6, 4), "nchw": (1, 4, 2, 3)}[layout]

    assert features_of(feature_map((3, 5)), pool=2, layout=layout).shape == shape


# --- projection


@pytest.mark.parametrize("grid", [(4, 5), (2, 3)], ids=["more patches", "more channels"])
def test_all_components_undo_the_projection(grid):
    features = feature_map(grid, channels=8)

    parts = parts_of(features, project=min(grid[0] * grid[1], 8), dtype="float32", layout="tokens")

    restored = parts["features"] @ parts["basis"] + parts["mean"]
    torch.testing.assert_close(restored, tokens_of(features), rtol=1e-5, atol=1e-5)


def test_a_projection_sends_as_many_channels_as_components_and_what_undoes_it():
    features = feature_map((4, 5), channels=8, dtype=torch.bfloat16)

    parts = parts_of(features, project=3, dtype="float16", layout="nchw")

    assert parts["features"].shape == (1, 3, 4, 5)
    assert (parts["basis"].shape, parts["basis"].dtype) == ((3, 8), torch.float32)
    assert (parts["mean"].shape, parts["mean"].dtype) == ((8,), torch.float32)


@pytest.mark.parametrize(
    ("grid", "pool", "most"), [((4, 5), "none", 8), ((2, 3), "none", 6), ((2, 3), "mean", 1)]
)
def test_more_components_than_there_are_are_refused_with_the_most(grid, pool, most):
    features = feature_map(grid, channels=8)
    assert parts_of(features, project=most, pool=pool)

    with pytest.raises(InvalidOptionError, match=f"image 2.*ask for {most} or fewer") as caught:
        parts_of(features, project=most + 1, pool=pool, index=2)

    assert caught.value.index == 2


def test_vectors_are_pooled_then_projected_then_normalised():
    features = feature_map((4, 6), channels=8)
    coarse = features_of(features, pool=2, dtype="float32", layout="tokens")

    parts = parts_of(features, pool=2, project=2, normalize=True, dtype="float32", layout="tokens")

    scores = (coarse - coarse.mean(dim=0)) @ parts["basis"].T
    expected = scores / scores.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(parts["features"], expected, rtol=1e-4, atol=1e-5)


# --- int8


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_times_its_scale_is_the_value_within_half_a_step(source_dtype, scale):
    tokens_NC = (noise(6, 64) * scale).to(source_dtype)

    parts = parts_of(map_of_tokens(tokens_NC), dtype="int8", layout="tokens")

    steps, scales = parts["features"], parts["scale"]
    assert (steps.dtype, scales.dtype) == (torch.int8, torch.float32)
    error = (steps.float() * scales[:, None] - tokens_NC.float()).abs()
    # Beside the half step the two divisions round.
    assert bool((error <= scales[:, None] * 0.5001).all())
    assert steps.abs().amax(dim=-1).tolist() == [127] * 6
    assert int(steps.min()) >= -127


@pytest.mark.parametrize(
    ("boxes", "options", "shape"),
    [
        (None, {"layout": "grid"}, (2, 3)),
        (None, {"layout": "tokens"}, (6,)),
        (None, {"layout": "nchw"}, (1, 2, 3)),
        (None, {"layout": "nchw", "pool": 2}, (1, 1, 2)),
        (None, {"layout": "grid", "pool": "mean"}, ()),
        (None, {"layout": "nchw", "pool": "mean"}, ()),
        (None, {"layout": "grid", "project": 1}, (2, 3)),
        (None, {"layout": "nchw", "project": 1}, (1, 2, 3)),
        (1, {"layout": "grid"}, (4,)),
        (1, {"layout": "nchw"}, (4,)),
        (2, {"layout": "grid"}, (4, 2, 2)),
        (2, {"layout": "tokens"}, (4, 4)),
        (2, {"layout": "nchw"}, (4, 2, 2)),
    ],
)
def test_a_scale_has_the_place_of_its_vector(boxes, options, shape):
    wanted = regions(*BOXES, box_size=boxes) if boxes else None

    parts = parts_of(
        boxes=wanted, dtype="int8", **({"box_size": boxes} if boxes else {}), **options
    )

    channel = 1 if options["layout"] == "nchw" and parts["features"].ndim == 4 else -1
    assert parts["scale"].shape == shape
    exact = features_of(
        boxes=wanted, dtype="float32", **({"box_size": boxes} if boxes else {}), **options
    )
    restored = parts["features"].float() * parts["scale"].unsqueeze(channel)
    torch.testing.assert_close(restored, exact, rtol=0, atol=float(exact.abs().max()) / 127)


def test_a_vector_of_zeros_is_zeros_in_int8_with_a_scale_that_can_be_divided_by():
    tokens_NC = noise(6, 4)
    tokens_NC[2] = 0.0

    parts = parts_of(map_of_tokens(tokens_NC), dtype="int8", layout="tokens")

    assert parts["features"][2].tolist() == [0, 0, 0, 0]
    assert bool((parts["scale"] > 0).all())


def test_what_is_included_beside_int8_is_float16():
    parts = parts_of(dtype="int8", include=("cls",), project=2)

    assert parts["cls"].dtype == torch.float16
    assert parts["basis"].dtype == parts["mean"].dtype == torch.float32


# --- what is included


def test_nothing_is_included_that_was_not_asked_for():
    layer = encoded_layer(GRID, registers_RC=noise(14, 4), spurious_N2=noise(6, 2))

    assert list(parts_of(feature_map(GRID, layers=[layer]))) == ["features"]


@pytest.mark.parametrize("boxes", [None, regions(*BOXES)], ids=["patches", "boxes"])
def test_included_tokens_are_sent_as_the_model_gave_them(boxes):
    layer = encoded_layer(
        GRID, prefix_PC=noise(5, 4), registers_RC=noise(14, 4), spurious_N2=noise(6, 2)
    )

    parts = parts_of(
        feature_map(GRID, layers=[layer]),
        boxes,
        include=("spurious", "registers", "cls"),
        dtype="float32",
        normalize=boxes is None,
    )

    assert list(parts) == ["features", "cls", "registers", "spurious"]
    torch.testing.assert_close(parts["cls"], layer.prefix_PC, rtol=0, atol=0)
    torch.testing.assert_close(parts["registers"], layer.registers_RC, rtol=0, atol=0)
    torch.testing.assert_close(parts["spurious"], layer.spurious_N2.reshape(2, 3, 2))


def test_how_spurious_patches_are_is_told_of_each_patch_whatever_is_pooled():
    layer = encoded_layer(GRID, spurious_N2=noise(6, 2))

    parts = parts_of(
        feature_map(GRID, layers=[layer]), include=("spurious",), pool=2, dtype="bfloat16"
    )

    assert (parts["spurious"].shape, parts["spurious"].dtype) == ((2, 3, 2), torch.float32)


def test_a_model_without_prefix_tokens_includes_none():
    layer = encoded_layer(GRID, prefix_PC=torch.zeros(0, 4))

    assert parts_of(feature_map(GRID, layers=[layer]), include=("cls",))["cls"].shape == (0, 4)


# --- boxes


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("box_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boxes_from_the_map_are_those_of_a_batch_on_the_device_bit_for_bit(
    normalize, box_size, dtype
):
    kind = {"box_size": box_size, "normalize": normalize}
    wanted = [regions(*BOXES, **kind), regions(**kind), regions(*BOXES[:2], **kind)]
    layers = [encoded_layer((5, 7), seed=seed, channels=32, dtype=dtype) for seed in range(3)]
    batch = DenseFeatures(
        torch.stack([layer.tokens_NC for layer in layers]),
        (5, 7),
        1,
        torch.stack([layer.prefix_PC for layer in layers]),
    )

    for layer, boxes, on_device in zip(layers, wanted, align(batch, wanted), strict=True):
        features = feature_map((5, 7), layers=[layer])
        from_map = features_of(features, boxes, dtype="float32", layout="tokens", **kind)
        shape = (boxes.num_boxes, box_size**2, 32) if box_size > 1 else (boxes.num_boxes, 32)
        assert from_map.shape == shape
        assert torch.equal(from_map, on_device.float().reshape(shape))


def test_boxes_that_the_device_cut_out_are_sent_as_they_are():
    boxes = regions(*BOXES)
    layer = encoded_layer(GRID, tokens_NC=None, boxes_VC=noise(4, 4))

    sent = features_of(feature_map(GRID, layers=[layer], regions=boxes), boxes, dtype="float32")

    assert sent.data_ptr() == layer.boxes_VC.data_ptr()


def test_boxes_that_the_device_cut_out_for_another_request_are_not_taken():
    theirs, ours = regions(*BOXES[:1]), regions(*BOXES[1:2])
    layer = encoded_layer(GRID, boxes_VC=noise(1, 4, seed=9))
    features = feature_map(GRID, layers=[layer], regions=theirs)

    sent = features_of(features, ours, dtype="float32")

    expected = features_of(feature_map(GRID, layers=[layer]), ours, dtype="float32")
    assert torch.equal(sent, expected)
    assert not torch.equal(sent, layer.boxes_VC)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_image_without_boxes_has_no_vectors(dtype):
    assert features_of(boxes=regions(), dtype=dtype).shape == (0, 4)


# --- counting


@pytest.mark.parametrize(
    ("boxes", "options"),
    [
        (None, {}),
        (None, {"pool": "mean"}),
        (None, {"pool": 2}),
        (None, {"project": 2}),
        (None, {"pool": 3, "project": 1, "layout": "nchw"}),
        (regions(*BOXES), {}),
        (regions(*BOXES, box_size=2), {"box_size": 2}),
    ],
)
def test_values_are_counted_before_they_are_computed(boxes, options):
    features = feature_map((5, 7))
    wanted = FeatureOptions(**options)
    finished = finish(features, boxes, wanted, index=0)

    counted = num_values(wanted, (5, 7), boxes, channels=4)

    (sent,) = (part.tensor for part in finished.parts if part.kind == "features")
    assert counted == sent.numel()


@pytest.mark.parametrize(
    "options",
    [
        {"include": ("cls",)},
        {"include": ("registers", "spurious")},
        {"include": ("cls",), "project": 2},
        {"pool": "mean", "include": ("spurious",)},
    ],
)
def test_values_of_other_kinds_are_counted_too(options):
    layer = encoded_layer((5, 7), registers_RC=noise(11, 4), spurious_N2=noise(35, 2))
    wanted = FeatureOptions(**options)
    finished = finish(feature_map((5, 7), layers=[layer]), None, wanted, index=0)

    counted = num_more_values(wanted, (5, 7), channels=4, prefix=len(layer.prefix_PC), registers=11)

    more = (part.tensor for part in finished.parts if part.kind != "features")
    assert counted == sum(tensor.numel() for tensor in more)
