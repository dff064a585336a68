"""The client and the service, each as it really is."""

import asyncio
import hashlib
import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from service.client import (
    AsyncFeatureClient,
    AuthenticationError,
    FeatureClient,
    Features,
    RefusedError,
)
from service.client.__main__ import main
from tests.support import encoded, noise_image

PHOTO = noise_image(70, 50)
MODEL_CHANNELS = 32


@pytest.fixture(scope="module")
def server(server_process):
    return server_process("--precision", "fp32", "--torch-threads", "1")


@pytest.fixture
def client(server):
    with FeatureClient(server.url) as client:
        yield client


def cosines(first, second):
    return torch.cosine_similarity(first.float(), second.float(), dim=-1)


def test_the_forms_of_an_image_have_the_same_features(client, tmp_path):
    file = encoded(PHOTO)
    (tmp_path / "photo.png").write_bytes(file)
    array = np.asarray(PHOTO)
    tensor = torch.from_numpy(array.copy())
    forms = [tmp_path / "photo.png", PHOTO, array, tensor, tensor.permute(2, 0, 1)]

    wanted = client.feature(file, dtype="float32")

    for form in forms:
        found = client.feature(form, dtype="float32")
        torch.testing.assert_close(found.features, wanted.features)
        assert found.original_size == (70, 50)


def test_a_turned_photograph_is_the_same_as_file_and_as_pil(client):
    turned = PHOTO.getexif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    PHOTO.save(buffer, "PNG", exif=turned)

    as_file = client.feature(buffer.getvalue(), dtype="float32", size=64)
    as_pil = client.feature(Image.open(buffer), dtype="float32", size=64)

    assert as_file.original_size == as_pil.original_size == (50, 70)
    torch.testing.assert_close(as_file.features, as_pil.features)


def test_many_images_of_many_sizes_come_in_order(client):
    images = [noise_image(40 + 5 * i, 90 - 3 * i, seed=i) for i in range(20)]

    found = client.features([encoded(image) for image in images], size=64)

    assert [item.original_size for item in found] == [(i.height, i.width) for i in images]
    assert found[0].model_digest == client.info()["models"][0]["digest"]


def test_a_batch_of_pixels_goes_at_once(client):
    batch = np.stack([np.asarray(noise_image(32, 48, seed=i)) for i in range(3)])

    found = client.features(batch, size=(32, 48), layout="tokens", dtype="float32")

    alone = [
        client.feature(image, size=(32, 48), layout="tokens", dtype="float32").features
        for image in batch
    ]
    for one, item in zip(alone, found, strict=True):
        assert item.features.shape == (6, MODEL_CHANNELS)
        torch.testing.assert_close(item.features, one, rtol=1e-3, atol=1e-3)


def test_the_stream_serves_all_and_says_which_failed(client, tmp_path):
    images = [encoded(noise_image(40, 40, seed=i)) for i in range(12)]
    images[5] = b"no image"
    images[7] = tmp_path / "none"

    found = dict(client.stream(iter(images), size=64))

    assert sorted(found) == list(range(12))
    assert {i for i, item in found.items() if not isinstance(item, Features)} == {5, 7}
    assert (found[5].code, found[5].index) == ("unsupported_image", 5)
    assert found[7].code == "unreadable_file"
    whole = client.feature(images[3], size=64)
    assert torch.equal(found[3].features, whole.features)


def test_partial_and_whole_requests_differ_in_what_an_error_costs(client):
    images = [encoded(PHOTO), b"no image", encoded(PHOTO)]

    with pytest.raises(RefusedError) as caught:
        client.features(images)
    found = client.features(images, partial=True)

    assert caught.value.index == 1
    assert [type(item) for item in found] == [Features, RefusedError, Features]
    assert found[1].index == 1


def test_narrow_dtypes_are_close_to_float32(client):
    image = encoded(PHOTO)
    wanted = client.feature(image, dtype="float32").features

    brain = client.feature(image, dtype="bfloat16")
    small = client.feature(image, dtype="int8")

    assert brain.features.dtype == torch.bfloat16
    assert brain.as_numpy().dtype == np.float32
    torch.testing.assert_close(brain.features.float(), wanted, rtol=2**-7, atol=2**-7)
    assert small.as_torch(raw=True).dtype == torch.int8
    assert small.features.shape == wanted.shape
    assert cosines(small.features, wanted).min() > 0.999


@pytest.mark.parametrize("layout", ["grid", "tokens", "nchw"])
def test_int8_is_scaled_in_every_layout(client, layout):
    image = encoded(PHOTO)

    wanted = client.feature(image, dtype="float32", layout=layout).features
    found = client.feature(image, dtype="int8", layout=layout).features

    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05)


def test_what_is_included_is_there(client):
    found = client.feature(
        encoded(PHOTO), include=["registers", "cls", "spurious"], layers=[0, 1], dtype="float32"
    )

    assert list(found.layers) == [0, 1]
    for layer in (0, 1):
        assert found.as_torch("registers", layer=layer).shape[1] == MODEL_CHANNELS
        assert found.as_torch("cls", layer=layer).shape[1] == MODEL_CHANNELS
        assert found.as_torch("spurious", layer=layer).shape == (*found.grid, 2)


def test_principal_components_can_be_undone(client):
    image = encoded(PHOTO)
    wanted = client.feature(image, dtype="float32").features

    found = client.feature(image, dtype="float32", project=12)

    restored = found.features @ found.as_torch("basis") + found.as_torch("mean")
    assert found.features.shape == (*found.grid, 12)
    assert (restored - wanted).norm() < (wanted - found.as_torch("mean")).norm()


def test_pooling_moves_the_grid_and_the_affine(client):
    found = client.feature(encoded(PHOTO), size=(64, 64), pool=2)

    assert found.grid == (2, 2)
    assert found.features.shape[:2] == (2, 2)
    assert found.pixel_box(1, 1) == pytest.approx((25, 35, 50, 70))


def test_boxes_come_for_each_image(client):
    image = encoded(PHOTO)

    found = client.features(
        [image, PHOTO, image], boxes=[[[0, 0, 50, 70]], [], [[0, 0, 9, 9], [1, 1, 20, 30]]]
    )

    assert [item.features.shape for item in found] == [(n, MODEL_CHANNELS) for n in (1, 0, 2)]
    assert [item.num_boxes for item in found] == [1, 0, 2]


def test_the_second_time_it_comes_from_the_cache(client):
    image = encoded(noise_image(33, 44, seed=9))

    first = client.feature(image)
    second = client.feature(image)
    third = client.feature(image, cache="bypass")

    assert [item.cache for item in (first, second, third)] == ["miss", "hit", "miss"]
    assert torch.equal(first.features, second.features)


def test_the_async_client_gets_the_same(client, server):
    images = [encoded(noise_image(40, 40, seed=i)) for i in range(5)]

    async def generate():
        for image in images:
            yield image

    async def ask():
        async with AsyncFeatureClient(server.url, batch_images=2) as other:
            listed = await other.features(images)
            streamed = {i: item async for i, item in other.stream(generate())}
            return listed, streamed

    listed, streamed = asyncio.run(ask())

    for i, item in enumerate(client.features(images)):
        assert torch.equal(listed[i].features, item.features)
        assert torch.equal(streamed[i].features, item.features)


def test_a_misspelt_option_is_explained(client):
    with pytest.raises(RefusedError, match="did you mean 'size'"):
        client.feature(encoded(PHOTO), sise=64)


def test_a_model_is_chosen_by_name(client, server):
    name = client.info()["models"][0]["name"]

    with FeatureClient(server.url, model=name) as named:
        assert named.feature(encoded(PHOTO)).model == name
    with FeatureClient(server.url, model="other") as named, pytest.raises(RefusedError) as caught:
        named.feature(encoded(PHOTO))
    assert caught.value.code == "unknown_model"


def test_a_short_deadline_is_kept(client):
    big = [encoded(noise_image(64, 64, seed=i)) for i in range(4)]

    found = client.features(big, deadline_seconds=20)

    assert len(found) == 4


def test_the_command_line_saves_what_the_client_gets(client, server, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise_image(40, 50, seed=i)))
    (tmp_path / "3.jpg").write_bytes(b"no image")
    out = tmp_path / "out.safetensors"

    status = main([str(tmp_path), "--url", server.url, "--out", str(out), "--size=64"])

    assert status == 1
    saved = safetensors.torch.load_file(out)
    assert sorted(saved) == ["0.png", "1.png", "2.png"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, client.feature(tmp_path / name, size=64).features)
    with safetensors.safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["images"])[0]["original_size"] == [40, 50]


def test_keys_are_asked_for(server_process, tmp_path):
    key = "a-long-secret-for-the-test"
    keys = tmp_path / "keys"
    keys.write_text(f"alice {hashlib.sha256(key.encode()).hexdigest()}\n")
    keys.chmod(0o600)
    locked = server_process("--precision", "fp32", "--api-key-file", str(keys))

    with FeatureClient(locked.url, api_key=key) as client:
        assert client.feature(encoded(PHOTO)).features.shape[-1] == MODEL_CHANNELS
    with FeatureClient(locked.url) as client, pytest.raises(AuthenticationError):
        client.feature(encoded(PHOTO))
