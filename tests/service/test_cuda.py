"""The service on a CUDA device: the same features, from graphs too, and nothing compiled late."""

import io

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from backbone import open_model
from service.graphs import GraphError, GraphPool, capture_buckets
from tests.support import encoded, noise_image

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")
PNG = {"content-type": "image/png"}


@pytest.fixture
def encoder(artifact):
    return open_model(artifact, device="cuda", precision="bf16")


def post(client, data, **query):
    response = client.post("/features", content=data, headers=PNG, params=query)
    assert response.status_code == 200, response.text
    return load(response.content)["features.0"]


def worst_error(one, other):
    return float((np.linalg.norm(one - other, axis=-1) / np.linalg.norm(one, axis=-1)).max())


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_features_are_those_of_the_cpu(serve, cuda_graphs):
    images = [encoded(noise_image(70 + n, 90, seed=n)) for n in range(5)]
    options = {"dtype": "float32", "cache": "bypass"}
    with serve() as client:
        wanted = [post(client, image, **options) for image in images]

    with serve(device="cuda", cuda_graphs=cuda_graphs, precision="bf16") as client:
        found = [post(client, image, **options) for image in images]
        metrics = client.get("/metrics").text

    for one, other in zip(wanted, found, strict=True):
        assert worst_error(one, other) < 0.05
    assert "refinery_late_compiles_total 0.0" in metrics


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_replayed_forward_gives_what_the_forward_gives(encoder, batch):
    pool = GraphPool(encoder)
    pool.record((64, 64), max_batch=4, tolerance=0.05)
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, device="cuda")

    features, num_padding = pool.run(images)

    (wanted,) = encoder.encode(images)
    torch.testing.assert_close(features.tokens, wanted.tokens, rtol=2e-2, atol=2e-2)
    assert num_padding == {1: 0, 3: 1, 4: 0}[batch]


@pytest.mark.gpu
@NEEDS_CUDA
def test_what_a_replay_gave_survives_the_next_one(encoder):
    pool = GraphPool(encoder)
    pool.record((64, 64), max_batch=1, tolerance=0.05)
    first, second = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8, device="cuda")

    features, _ = pool.run(first)
    before = features.tokens.clone()
    pool.run(second)

    assert torch.equal(features.tokens, before)


@pytest.mark.gpu
@NEEDS_CUDA
def test_sizes_that_are_not_recorded_have_no_replay(encoder):
    pool = GraphPool(encoder)
    pool.record((64, 64), max_batch=2, tolerance=0.05)

    assert pool.run(torch.zeros(1, 3, 64, 96, dtype=torch.uint8, device="cuda")) is None
    assert pool.run(torch.zeros(3, 3, 64, 64, dtype=torch.uint8, device="cuda")) is None


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("jpeg_decoder", ["cpu", "nvjpeg"])
def test_photographs_are_decoded_and_resized_on_the_device(serve, jpeg_decoder):
    file = io.BytesIO()
    noise_image(40, 60).resize((600, 400)).save(file, "JPEG", quality=95)
    with serve() as client:
        wanted = post(client, file.getvalue(), dtype="float32")

    with serve(device="cuda", jpeg_decoder=jpeg_decoder) as client:
        found = post(client, file.getvalue(), dtype="float32")

    assert worst_error(wanted, found) < 0.1


def test_graphs_on_demand_need_a_cuda_device(artifact):
    encoder = open_model(artifact, precision="fp32")

    with pytest.raises(GraphError, match="need a CUDA device, and this is cpu"):
        capture_buckets(encoder, [(64, 64)], max_tokens=100, mode="on", tolerance=1e-3)
    for mode in ("auto", "off"):
        assert capture_buckets(encoder, [], max_tokens=100, mode=mode, tolerance=1e-3) is None
