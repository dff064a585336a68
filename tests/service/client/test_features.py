"""Features of one image: where they lie, their layers, their scales."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from service.client import Features
from service.client.features import describe_answer, describe_image, tensors_by_image
from service.client.tensors import parse_safetensors
from tests.service.client.fake_service import DIGEST, entry, metadata
from tests.support import ROOT


def made(tensors, image=None, **changes):
    data = safetensors.torch.save(tensors, metadata([image or entry(0)], **changes))
    parsed, described = parse_safetensors(bytearray(data))
    common = describe_answer(described)
    (own,) = tensors_by_image(parsed, common["layer_numbers"]).values()
    return Features(
        index=0, tensors=own, request_id="r", **common, **describe_image(image or entry(0))
    )


def test_positions_and_patches_lead_to_each_other():
    # 300 x 450 px resized to 304 x 448: patches of 15.79 x 16.07 px of the photograph.
    affine = [[448 / 450 / 16, 0, 0], [0, 304 / 300 / 16, 0]]
    image = entry(0, grid=[19, 28], original_size=[300, 450], affine=affine)
    found = made({"features.0": torch.zeros(19, 28, 4)}, image)

    for row, column in ((0, 0), (7, 12), (18, 27)):
        x0, y0, x1, y1 = found.pixel_box(row, column)
        assert found.patch_of((x0 + x1) / 2, (y0 + y1) / 2) == (row, column)
    assert found.pixel_box(18, 27)[2:] == pytest.approx((450, 300))
    assert found.patch_of(0, 0) == (0, 0)
    assert found.patch_of(450, 300) == (18, 27)


def test_positions_outside_are_refused():
    found = made({"features.0": torch.zeros(2, 3, 4)})

    for x, y in ((-0.1, 0), (0, 33), (49, 0)):
        with pytest.raises(ValueError, match="outside"):
            found.patch_of(x, y)
    for row, column in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="no patch"):
            found.pixel_box(row, column)


def test_what_is_known_of_an_image_is_there():
    found = made({"features.0": torch.ones(2, 3, 4)}, entry(0, cache="hit"))

    assert (found.grid, found.original_size, found.resized_to) == ((2, 3), (32, 48), (32, 48))
    assert (found.bucket, found.cache, found.num_boxes) == ("32x48", "hit", None)
    assert (found.model, found.model_digest, found.patch_size) == ("fake", DIGEST, 16)
    assert found.affine == ((1 / 16, 0, 0), (0, 1 / 16, 0))
    assert (found.cls, found.registers, found.spurious) == (None, None, None)


def test_several_layers_are_a_dictionary():
    tensors = {f"features.0.layer{number}": torch.full((2, 3, 4), number) for number in (3, 11)}
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors |= {"cls.0.layer3": torch.ones(1, 4), "cls.0.layer11": torch.zeros(1, 4)}
    found = made(tensors, layers="[3, 11]")

    assert list(found.layers) == [3, 11]
    assert (found.layers[3] == 3).all()
    assert (found.as_numpy(layer=11) == 11).all()
    assert (found.as_torch("cls", layer=3) == 1).all()
    with pytest.raises(ValueError, match=r"layers \[3, 11\]"):
        _ = found.features
    with pytest.raises(KeyError, match="no features of layer 5"):
        found.as_torch(layer=5)


def test_companions_are_there_when_they_were_asked_for():
    tensors = {
        "features.0": torch.zeros(2, 3, 2),
        "cls.0": torch.ones(1, 4),
        "registers.0": torch.ones(5, 4),
        "spurious.0": torch.ones(2, 3, 2),
        "basis.0": torch.ones(2, 4),
        "mean.0": torch.ones(4),
    }
    found = made(tensors)

    assert (found.cls.shape, found.registers.shape) == ((1, 4), (5, 4))
    assert found.spurious.shape == (2, 3, 2)
    assert found.as_numpy("basis").shape == (2, 4)
    assert found.has("mean")
    assert not found.has("scale")


@pytest.mark.parametrize(
    ("layout", "shape", "scale_shape"),
    [
        ("grid", (2, 3, 4), (2, 3)),
        ("tokens", (6, 4), (6,)),
        ("nchw", (1, 4, 2, 3), (1, 2, 3)),
        ("grid", (2, 4), (2, 1)),
        ("nchw", (2, 4), (2,)),
    ],
)
def test_int8_comes_multiplied_by_the_scale_of_its_vector(layout, shape, scale_shape):
    values = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(scale_shape) + 0.1
    found = made({"features.0": values, "features.0.scale": scale}, layout=layout, dtype="int8")

    channel = 1 if layout == "nchw" and len(shape) == 4 else len(shape) - 1
    vectors = values.movedim(channel, -1).reshape(-1, 4)
    wanted = vectors.float() * scale.reshape(-1, 1)
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features.movedim(channel, -1).reshape(-1, 4), wanted)
    assert np.array_equal(found.as_numpy(), found.features.numpy())
    assert torch.equal(found.as_torch(raw=True), values)
    assert found.as_numpy(raw=True).dtype == np.int8
    assert torch.equal(found.as_torch("scale"), scale)


def test_arrays_need_no_torch():
    code = """
import sys
import numpy as np, safetensors.numpy
from service.client import FeatureClient
import httpx2 as httpx
meta = {"model": "m", "model_digest": "d", "patch_size": "16", "layers": "[1]", "dtype": "float16",
        "layout": "grid", "images": '[{"grid": [1, 1], "original_size": [16, 16], '
        '"resized_to": [16, 16], "affine": [[1, 0, 0], [0, 1, 0]]}]'}
body = safetensors.numpy.save({"features.0": np.ones((1, 1, 4), np.float16)}, meta)
def handler(request):
    return httpx.Response(200, headers={"content-type": "application/x-safetensors"},
                          stream=httpx.ByteStream(body))
with FeatureClient("http://x", transport=httpx.MockTransport(handler)) as client:
    found = client.feature(np.zeros((16, 16, 3), np.uint8))
print(found.as_numpy().sum(), 'torch' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert done.stdout.split() == ["4.0", "False"]
