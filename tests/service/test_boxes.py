"""Features of boxes, against torchvision's ROI-align of the grid that the service returns."""

import base64
import io
import json
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torchvision.ops import roi_align

from backbone import DenseFeatures, open_model
from service.boxes import Regions, align
from tests.service.box_requests import (
    BOXES,
    HEIGHT,
    OTHER,
    PHOTO,
    PNG,
    WIDTH,
    fault,
    post,
    post_json,
    query_of,
    wait_for_queue,
)


def metadata(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def expected(grid_hwC, boxes, box_size, original=(HEIGHT, WIDTH)):
    """torchvision's boxes of a grid of features: [K, p, p, C]."""
    (h, w, _), (height, width) = grid_hwC.shape, original
    to_patches = torch.tensor([w / width, h / height] * 2, dtype=torch.float64)
    rois = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) * to_patches
    features_1Chw = torch.from_numpy(grid_hwC).double().permute(2, 0, 1)[None]
    aligned = roi_align(features_1Chw, [rois], box_size, aligned=True)
    return aligned.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", ["64,64", "96,48", "112"])
@pytest.mark.parametrize("box_size", [1, 2, 7])
def test_boxes_are_those_of_torchvision_on_the_grid(client, size, box_size):
    grid = load(post(client, size=size, dtype="float32").content)["features.0"]

    response = post(client, size=size, dtype="float32", boxes=query_of(BOXES), box_size=box_size)

    rois = load(response.content)
    wanted = expected(grid, BOXES, box_size)
    assert set(rois) == {"features.0"}
    np.testing.assert_allclose(
        rois["features.0"], wanted[:, 0, 0] if box_size == 1 else wanted, rtol=1e-4, atol=1e-5
    )


def test_images_may_have_different_numbers_of_boxes_and_layers(client):
    options = {"dtype": "float32", "layers": [0, -1], "size": [64, 96]}
    grids = load(post_json(client, [PHOTO, OTHER, PHOTO], **options).content)
    boxes = [BOXES, [], [[1, 2, 30, 40]]]

    response = post_json(client, [PHOTO, OTHER, PHOTO], boxes=boxes, box_size=3, **options)

    rois = load(response.content)
    assert len(rois) == 6
    for layer in ("layer0", "layer1"):
        for index, image_boxes in enumerate(boxes):
            np.testing.assert_allclose(
                rois[f"features.{index}.{layer}"],
                expected(grids[f"features.{index}.{layer}"], image_boxes, 3),
                rtol=1e-4,
                atol=1e-5,
            )
    about = metadata(response.content)
    assert about["box_size"] == "3"
    assert [image["num_boxes"] for image in json.loads(about["images"])] == [5, 0, 1]


def test_images_of_several_sizes_keep_their_boxes(client):
    grids = load(post_json(client, [PHOTO, OTHER], size=96, dtype="float32").content)
    boxes = [[[5, 5, 50, 50]], [[5, 5, 50, 50], [0, 0, 64, 64]]]

    rois = load(post_json(client, [PHOTO, OTHER], size=96, dtype="float32", boxes=boxes).content)

    for index, original in ((0, (HEIGHT, WIDTH)), (1, (64, 64))):
        wanted = expected(grids[f"features.{index}"], boxes[index], 1, original)[:, 0, 0]
        np.testing.assert_allclose(rois[f"features.{index}"], wanted, rtol=1e-4, atol=1e-5)


def test_an_empty_box_and_one_outside_give_zeros(client):
    boxes = [[10, 10, 10, 10], [130, 10, 150, 30], [0, 0, 40, 40]]

    rois = load(post(client, boxes=query_of(boxes), normalize="true").content)["features.0"]

    assert not rois[:2].any()
    np.testing.assert_allclose(np.linalg.norm(rois[2].astype(np.float32)), 1, rtol=1e-3)


def test_normalised_boxes_have_unit_length_in_every_cell(client):
    plain = post(client, boxes="10,10,60,60", box_size=2, dtype="float32")
    unit = post(client, boxes="10,10,60,60", box_size=2, dtype="float32", normalize="1")

    plain, unit = (load(response.content)["features.0"] for response in (plain, unit))

    np.testing.assert_allclose(
        unit, plain / np.linalg.norm(plain, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("layout", "box_size", "shape"),
    [
        ("grid", 2, (5, 2, 2, 32)),
        ("tokens", 2, (5, 4, 32)),
        ("nchw", 2, (5, 32, 2, 2)),
        ("grid", 1, (5, 32)),
        ("tokens", 1, (5, 32)),
        ("nchw", 1, (5, 32)),
    ],
)
def test_boxes_come_in_every_layout_dtype_and_format(client, dtype, layout, box_size, shape):
    options = {"dtype": dtype, "layout": layout, "box_size": box_size, "boxes": query_of(BOXES)}

    def answer(media):
        return post(client, headers=PNG | {"accept": media}, **options)

    tensor = load(answer("application/x-safetensors").content)["features.0"]
    array = np.load(io.BytesIO(answer("application/x-npy").content))
    document = answer("application/json").json()

    grid = load(post(client, boxes=query_of(BOXES), box_size=box_size, dtype=dtype).content)
    rois = grid["features.0"].reshape(5, box_size**2, 32)
    wanted = rois.transpose(0, 2, 1) if layout == "nchw" else rois
    assert tensor.shape == shape
    assert tensor.dtype == array.dtype == document["dtype"] == dtype
    np.testing.assert_array_equal(tensor, wanted.reshape(shape))
    np.testing.assert_array_equal(array, tensor[np.newaxis])
    assert document["box_size"] == box_size
    (image,) = document["images"]
    assert image["num_boxes"] == 5
    (sent,) = image["features"]
    decoded = np.frombuffer(base64.b64decode(sent["data"]), dtype).reshape(sent["shape"])
    np.testing.assert_array_equal(decoded, tensor)


def test_npy_takes_as_many_boxes_for_each_image(client):
    npy = {"accept": "application/x-npy"}
    same = [[[0, 0, 10, 10]], [[5, 5, 20, 20]]]

    array = np.load(io.BytesIO(post_json(client, [PHOTO, OTHER], npy, boxes=same).content))

    assert array.shape == (2, 1, 32)
    uneven = post_json(client, [PHOTO, OTHER], npy, boxes=[same[0], []])
    assert "as many boxes" in fault(uneven)["message"]


def test_images_with_and_without_boxes_that_wait_together_keep_to_themselves(
    serve, watched_encoder
):
    kinds = [{}, {"boxes": "0,0,60,60"}] * 2 + [{"boxes": "0,0,60,60", "box_size": 2}]
    kinds = [kind | {"cache": "bypass"} for kind in kinds]

    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        alone = [load(post(client, **kind).content)["features.0"] for kind in kinds]
        watched_encoder.hold()
        first = threads.submit(post, client, cache="bypass")
        watched_encoder.wait_until_held()
        rest = [threads.submit(post, client, **kind) for kind in kinds]
        wait_for_queue(client, len(kinds))
        watched_encoder.gate.set()
        first.result()
        together = [load(future.result().content)["features.0"] for future in rest]

    batch_sizes = [batch[0] for batch in watched_encoder.batches]
    assert (batch_sizes[0], sorted(batch_sizes[1:])) == (1, [1, 2, 2])
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=1e-3)


def test_the_device_answers_in_the_precision_of_the_model():
    tokens_BNC = torch.randn(2, 6, 8).bfloat16()
    features = DenseFeatures(tokens_BNC, (2, 3), 16, tokens_BNC[:, :0])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    regions = [Regions(whole, 1, False), Regions(whole.repeat(2, 1), 1, False)]

    one, two = align(features, regions)

    assert one.dtype == torch.bfloat16
    assert (one.shape, two.shape) == ((1, 8), (2, 8))
    wanted = tokens_BNC[0].float().mean(dim=0)
    torch.testing.assert_close(one[0].float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("box_size", [1, 3])
def test_normalised_boxes_of_a_bfloat16_model_have_unit_length(serve, artifact, box_size):
    encoder = open_model(artifact, precision="bf16")

    with serve(lambda *_: encoder) as client:
        options = {"normalize": "1", "dtype": "float32", "boxes": query_of(BOXES[:2])}
        rois = load(post(client, box_size=box_size, **options).content)["features.0"]

    np.testing.assert_allclose(np.linalg.norm(rois, axis=-1), 1, rtol=1e-6)


def test_boxes_on_a_wide_low_grid_take_little_memory():
    tokens_BNC = torch.randn(1, 2700, 32)
    features = DenseFeatures(tokens_BNC, (1, 2700), 16, tokens_BNC[:, :0])
    overhanging = torch.tensor([[-1.0, -1.0, 2.0, 2.0]]).repeat(30, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (rois_VC,) = align(features, [Regions(overhanging, 1, False)])

    # A sample of every box at every cell would be 30 * 2700 * 2700 numbers, 875 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    wanted_C = tokens_BNC[0].mean(dim=0) / 3  # columns; rows next to the rim count as the rim
    torch.testing.assert_close(rois_VC, wanted_C.expand(30, -1), rtol=0, atol=2e-3)


def test_boxes_are_counted(serve):
    with serve() as client:
        post(client, boxes=query_of(BOXES))
        post(client, boxes=query_of(BOXES), cache="refresh")
        post(client)
        text = client.get("/metrics").text

    assert "refinery_boxes_total 10.0" in text


def test_boxes_of_many_requests_share_a_batch(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        queries = [{"boxes": query_of([box]), "cache": "bypass"} for box in BOXES]
        alone = [load(post(client, **query).content)["features.0"] for query in queries]
        watched_encoder.hold()
        first = threads.submit(post, client, cache="bypass")
        watched_encoder.wait_until_held()
        rest = [threads.submit(post, client, **query) for query in queries]
        wait_for_queue(client, len(BOXES))
        watched_encoder.gate.set()
        first.result()
        together = [load(future.result().content)["features.0"] for future in rest]

    assert [batch[0] for batch in watched_encoder.batches] == [1, 5]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=1e-3)
