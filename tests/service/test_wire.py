import asyncio
import base64
import io
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from service import errors, wire
from service.schemas import FeatureOptions

GRID = (2, 3)
SOURCE = wire.Source(model="demo", digest="abc", patch_size=16, layers=(1,))


def tokens(seed=0, num=6, dtype=torch.float32):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def image(options, seed=0, grid=GRID, layers=1):
    arrays = tuple(
        wire.to_array(tokens(seed + layer, grid[0] * grid[1]), grid, options, index=0)
        for layer in range(layers)
    )
    return wire.ImageFeatures(arrays, grid, original=(64, 96), resized=(32, 48))


def body(media, images, options, source=SOURCE):
    return b"".join(wire.serialise(media, images, options, source))


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, "application/x-safetensors"),
        ("", "application/x-safetensors"),
        ("*/*", "application/x-safetensors"),
        ("application/*", "application/x-safetensors"),
        ("application/json", "application/json"),
        ("Application/X-NPY", "application/x-npy"),
        ("text/html, application/json;q=0.5, application/x-npy;q=0.9", "application/x-npy"),
        ("application/x-safetensors;q=0, */*", "application/x-npy"),
        ("*/*;q=0.1, application/json;q=0.2", "application/json"),
    ],
)
def test_accept_chooses_the_format(accept, media):
    assert wire.negotiate(accept) == media


@pytest.mark.parametrize("accept", ["text/html", "image/png", "*/*;q=0", "application/json;q=x"])
def test_formats_that_are_not_offered_are_refused_with_those_that_are(accept):
    with pytest.raises(errors.NotAcceptableError, match="x-safetensors"):
        wire.negotiate(accept)


@pytest.mark.parametrize(("dtype", "numpy"), [("float16", np.float16), ("float32", np.float32)])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_their_values_in_every_layout(dtype, numpy, source_dtype):
    source = tokens(dtype=source_dtype)
    expected = source.float().numpy().astype(numpy)

    def array(layout):
        return wire.to_array(source, GRID, FeatureOptions(dtype=dtype, layout=layout), index=0)

    np.testing.assert_array_equal(array("tokens"), expected)
    np.testing.assert_array_equal(array("grid"), expected.reshape(2, 3, 4))
    np.testing.assert_array_equal(
        array("nchw"), expected.reshape(2, 3, 4).transpose(2, 0, 1)[np.newaxis]
    )
    assert array("nchw").dtype == numpy
    assert array("nchw").flags["C_CONTIGUOUS"]


def test_normalised_tokens_have_unit_length():
    array = wire.to_array(
        tokens(), GRID, FeatureOptions(normalize=True, dtype="float32", layout="tokens"), index=0
    )

    np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1.0, rtol=1e-6)


def test_values_beyond_float16_are_refused_and_not_sent_as_infinity():
    huge = tokens()
    huge[2, 1] = 1e6

    with pytest.raises(errors.FeatureOverflowError, match="image 3.*float32") as caught:
        wire.to_array(huge, GRID, FeatureOptions(), index=3)

    assert caught.value.index == 3
    assert wire.to_array(huge, GRID, FeatureOptions(dtype="float32"), index=3).max() == 1e6


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_safetensors_hold_every_image_and_say_where_it_lies(dtype):
    options = FeatureOptions(dtype=dtype, normalize=True)
    images = [image(options, 0), image(options, 1, grid=(3, 2))]

    data = body("application/x-safetensors", images, options)

    loaded = load(data)
    assert sorted(loaded) == ["features.0", "features.1"]
    np.testing.assert_array_equal(loaded["features.1"], images[1].arrays[0])
    assert loaded["features.0"].dtype == dtype
    metadata = safetensors_metadata(data)
    assert metadata["model_digest"] == "abc"
    assert metadata["layers"] == "[1]"
    assert metadata["normalize"] == "true"
    assert (metadata["dtype"], metadata["layout"], metadata["patch_size"]) == (dtype, "grid", "16")
    assert json.loads(metadata["images"])[0] == {
        "grid": [2, 3],
        "original_size": [64, 96],
        "resized_to": [32, 48],
        "affine": [[0.03125, 0.0, 0.0], [0.0, 0.03125, 0.0]],
    }


def test_safetensors_tensors_begin_on_eight_bytes():
    data = body("application/x-safetensors", [image(FeatureOptions())], FeatureOptions())

    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_several_layers_are_named_by_their_block():
    source = wire.Source(model="demo", digest="abc", patch_size=16, layers=(5, 11))
    features = image(FeatureOptions(), layers=2)

    loaded = load(body("application/x-safetensors", [features], FeatureOptions(), source))

    assert set(loaded) == {"features.0.layer5", "features.0.layer11"}
    np.testing.assert_array_equal(loaded["features.0.layer11"], features.arrays[1])


@pytest.mark.parametrize(
    ("layout", "shape"), [("grid", (2, 2, 3, 4)), ("tokens", (2, 6, 4)), ("nchw", (2, 4, 2, 3))]
)
def test_npy_is_one_array_with_an_image_axis(layout, shape):
    options = FeatureOptions(layout=layout)
    images = [image(options, 0), image(options, 1)]

    array = np.load(io.BytesIO(body("application/x-npy", images, options)))

    assert array.shape == shape
    np.testing.assert_array_equal(array[1], np.squeeze(images[1].arrays[0]))


def test_npy_refuses_what_one_array_cannot_hold():
    options = FeatureOptions()
    two_layers = wire.Source(model="demo", digest="abc", patch_size=16, layers=(0, 1))

    with pytest.raises(errors.InvalidOptionError, match="2 layers"):
        body("application/x-npy", [image(options, layers=2)], options, two_layers)
    with pytest.raises(errors.InvalidOptionError, match="2 shapes"):
        body("application/x-npy", [image(options), image(options, grid=(3, 2))], options)


def test_json_carries_base64_with_shape():
    options = FeatureOptions()
    features = image(options)

    document = json.loads(body("application/json", [features], options))

    sent = document["images"][0]["features"][0]
    array = np.frombuffer(base64.b64decode(sent["data"]), document["dtype"])
    np.testing.assert_array_equal(array.reshape(sent["shape"]), features.arrays[0])
    assert document["images"][0]["grid"] == [2, 3]
    assert sent["layer"] == 1


def test_json_is_refused_beyond_a_million_values():
    options = FeatureOptions()
    wire.check_response_size("application/json", 1_000_000, options)
    wire.check_response_size("application/x-npy", 1_000_001, options)

    with pytest.raises(errors.ResponseTooLargeError, match="safetensors, or for a smaller size"):
        wire.check_response_size("application/json", 1_000_001, options)


def test_advice_on_too_large_json_of_boxes_is_about_boxes():
    options = FeatureOptions(boxes=(((0.0, 0.0, 1.0, 1.0),),))

    with pytest.raises(errors.ResponseTooLargeError, match="fewer boxes or a smaller box_size"):
        wire.check_response_size("application/json", 1_000_001, options)


def test_parts_are_sent_as_they_are():
    sent = []

    async def send(message):
        sent.append(message)

    parts = [b"head", memoryview(b"tensor")]
    asyncio.run(wire.PartsResponse(parts, "application/x-npy", {"a": "b"})({}, None, send))

    assert (b"content-length", b"10") in sent[0]["headers"]
    assert [message["body"] for message in sent[1:]] == parts
    assert sent[2]["body"] is parts[1]
    assert [message["more_body"] for message in sent[1:]] == [True, False]


def safetensors_metadata(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]
