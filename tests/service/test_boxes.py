"""Features of boxes, against torchvision's ROI-align of the grid that the service returns."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torchvision.ops import roi_align

from backbone import DenseFeatures
from service.boxes import Regions, align
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
HEIGHT, WIDTH = 80, 112
PHOTO = encoded(noise_image(HEIGHT, WIDTH))
OTHER = encoded(noise_image(64, 64, seed=1))
BOXES = [
    [10.5, 20, 60, 70.25],
    [0, 0, WIDTH, HEIGHT],
    [-30, -10, 40, 30],  # partly outside
    [90, 60, 200, 150],  # partly outside at the other end
    [50, 30, 50.5, 30.5],  # smaller than a patch
]


def post(client, data=PHOTO, headers=PNG, **query):
    response = client.post("/features", content=data, headers=headers, params=query)
    assert response.status_code == 200, response.text
    return response


def post_json(client, images, headers=None, **options):
    items = [{"data": base64.b64encode(data).decode()} for data in images]
    return client.post("/features", json={"images": items, "options": options}, headers=headers)


def fault(response, code="invalid_option"):
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == code
    return error


def query_of(boxes):
    return ",".join(str(side) for box in boxes for side in box)


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

    cells = load(response.content)
    wanted = expected(grid, BOXES, box_size)
    assert set(cells) == {"boxes.0"}
    np.testing.assert_allclose(
        cells["boxes.0"], wanted[:, 0, 0] if box_size == 1 else wanted, rtol=1e-4, atol=1e-5
    )


def test_images_may_have_different_numbers_of_boxes_and_layers(client):
    options = {"dtype": "float32", "layers": [0, -1], "size": [64, 96]}
    grids = load(post_json(client, [PHOTO, OTHER, PHOTO], **options).content)
    boxes = [BOXES, [], [[1, 2, 30, 40]]]

    response = post_json(client, [PHOTO, OTHER, PHOTO], boxes=boxes, box_size=3, **options)

    cells = load(response.content)
    assert len(cells) == 6
    for layer in ("layer0", "layer1"):
        for index, of_image in enumerate(boxes):
            np.testing.assert_allclose(
                cells[f"boxes.{index}.{layer}"],
                expected(grids[f"features.{index}.{layer}"], of_image, 3),
                rtol=1e-4,
                atol=1e-5,
            )
    about = metadata(response.content)
    assert about["box_size"] == "3"
    assert [image["num_boxes"] for image in json.loads(about["images"])] == [5, 0, 1]


def test_images_of_several_sizes_keep_their_boxes(client):
    grids = load(post_json(client, [PHOTO, OTHER], size=96, dtype="float32").content)
    boxes = [[[5, 5, 50, 50]], [[5, 5, 50, 50], [0, 0, 64, 64]]]

    cells = load(post_json(client, [PHOTO, OTHER], size=96, dtype="float32", boxes=boxes).content)

    for index, original in ((0, (HEIGHT, WIDTH)), (1, (64, 64))):
        wanted = expected(grids[f"features.{index}"], boxes[index], 1, original)[:, 0, 0]
        np.testing.assert_allclose(cells[f"boxes.{index}"], wanted, rtol=1e-4, atol=1e-5)


def test_an_empty_box_and_one_outside_give_zeros(client):
    boxes = [[10, 10, 10, 10], [30, 30, 20, 20], [130, 10, 150, 30], [0, 0, 40, 40]]

    cells = load(post(client, boxes=query_of(boxes), normalize="true").content)["boxes.0"]

    assert not cells[:3].any()
    np.testing.assert_allclose(np.linalg.norm(cells[3].astype(np.float32)), 1, rtol=1e-3)


def test_normalised_boxes_have_unit_length_in_every_cell(client):
    plain = post(client, boxes="10,10,60,60", box_size=2, dtype="float32")
    unit = post(client, boxes="10,10,60,60", box_size=2, dtype="float32", normalize="1")

    plain, unit = (load(response.content)["boxes.0"] for response in (plain, unit))

    np.testing.assert_allclose(
        unit, plain / np.linalg.norm(plain, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "written",
    [
        {"boxes": "1,2,30,40,5,6,70.5,8e1"},
        {"boxes": "[1, 2, 30, 40, 5, 6, 70.5, 80]"},
        {"boxes": ["1,2,30,40", "5,6,70.5,80"]},
    ],
)
def test_boxes_of_one_image_read_the_same_from_query_and_body(client, written):
    boxes = [[1, 2, 30, 40], [5, 6, 70.5, 80]]
    flat = load(post_json(client, [PHOTO], boxes=boxes).content)["boxes.0"]
    listed = load(post_json(client, [PHOTO], boxes=[boxes]).content)["boxes.0"]

    np.testing.assert_array_equal(load(post(client, **written).content)["boxes.0"], flat)
    np.testing.assert_array_equal(listed, flat)


@pytest.mark.parametrize("boxes", [[], [[]]])
def test_an_image_may_have_no_boxes(client, boxes):
    response = post_json(client, [PHOTO], boxes=boxes, box_size=2)

    assert load(response.content)["boxes.0"].shape == (0, 2, 2, 32)
    in_json = post_json(client, [PHOTO], {"accept": "application/json"}, boxes=boxes)
    assert in_json.json()["images"][0]["boxes"][0] == {"layer": 1, "shape": [0, 32], "data": ""}
    in_npy = post_json(client, [PHOTO], {"accept": "application/x-npy"}, boxes=boxes)
    assert np.load(io.BytesIO(in_npy.content)).shape == (1, 0, 32)


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

    tensor = load(answer("application/x-safetensors").content)["boxes.0"]
    array = np.load(io.BytesIO(answer("application/x-npy").content))
    document = answer("application/json").json()

    grid = load(post(client, boxes=query_of(BOXES), box_size=box_size, dtype=dtype).content)
    cells = grid["boxes.0"].reshape(5, box_size**2, 32)
    wanted = cells.transpose(0, 2, 1) if layout == "nchw" else cells
    assert tensor.shape == shape
    assert tensor.dtype == array.dtype == document["dtype"] == dtype
    np.testing.assert_array_equal(tensor, wanted.reshape(shape))
    np.testing.assert_array_equal(array, tensor[np.newaxis])
    assert document["box_size"] == box_size
    (image,) = document["images"]
    assert "features" not in image
    assert image["num_boxes"] == 5
    (sent,) = image["boxes"]
    decoded = np.frombuffer(base64.b64decode(sent["data"]), dtype).reshape(sent["shape"])
    np.testing.assert_array_equal(decoded, tensor)


def test_npy_takes_as_many_boxes_for_each_image(client):
    npy = {"accept": "application/x-npy"}
    same = [[[0, 0, 10, 10]], [[5, 5, 20, 20]]]

    array = np.load(io.BytesIO(post_json(client, [PHOTO, OTHER], npy, boxes=same).content))

    assert array.shape == (2, 1, 32)
    uneven = post_json(client, [PHOTO, OTHER], npy, boxes=[same[0], []])
    assert "as many boxes" in fault(uneven)["message"]


def test_images_with_and_without_boxes_do_not_disturb_each_other(client):
    alone = load(post(client, dtype="float32").content)["features.0"]
    post(client, boxes="0,0,20,20")

    np.testing.assert_array_equal(load(post(client, dtype="float32").content)["features.0"], alone)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 3]], "box 0 of image 0 is [1, 2, 3], not 4 finite numbers"),
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5]], "box 1 of image 0"),
        ([[[1, 2, 3, 4], [1, 2, 3, "x"]]], "box 1 of image 0 is [1, 2, 3, 'x']"),
        ([[1, 2, 3, None]], "box 0 of image 0"),
        ([[1, 2, 3, True]], "box 0 of image 0"),
        ([1, 2, 3, 4], "1 is no list of boxes"),
        ([[[1, 2, 3, 4]], 5], "5 is no list of boxes"),
        ("0 0 1 1", "boxes"),
        ({"a": 1}, "boxes"),
        ([[[1, 2, 3, 4]], [[1, 2, 3, 4]]], "2 lists of boxes for 1 images"),
        ([[0, 0, 10, 500]], "box 0 of image 0 is [0.0, 0.0, 10.0, 500.0], further outside"),
        ([[0, 0, 1, 1], [-1e30, 0, 1, 1]], "box 1 of image 0"),
    ],
)
def test_impossible_boxes_are_refused_and_named(client, boxes, message):
    response = post_json(client, [PHOTO], boxes=boxes)

    assert message in fault(response)["message"]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("1,2,3", "box 0 of image 0 is [1.0, 2.0, 3.0]"),
        ("1,2,3,4,5", "box 1 of image 0 is [5.0]"),
        (["1,2,3,4", "1,2"], "box 1 of image 0 is [1.0, 2.0]"),
        ("", "box 0 of image 0 is ['']"),
        ("1,2,nan,4", "box 0 of image 0 is [1.0, 2.0, 'nan', 4.0]"),
        ("1,2,inf,4", "'inf'"),
        ("[[1,2,3,4]]", "box 0 of image 0"),
    ],
)
def test_impossible_boxes_in_the_query_are_refused(client, boxes, message):
    response = client.post("/features", content=PHOTO, headers=PNG, params={"boxes": boxes})

    assert message in fault(response)["message"]


def test_several_images_need_a_list_each(client):
    response = post_json(client, [PHOTO, OTHER], boxes=[[0, 0, 1, 1]])

    assert "1 lists of boxes for 2 images" in fault(response)["message"]
    assert "0 lists" in fault(post_json(client, [PHOTO, OTHER], boxes=[]))["message"]


@pytest.mark.parametrize("box_size", [0, -1, 65, 1.5, "big", True, [7, 7]])
def test_impossible_box_sizes_are_refused(client, box_size):
    response = post_json(client, [PHOTO], boxes=[[0, 0, 9, 9]], box_size=box_size)

    assert "'box_size'" in fault(response)["message"]


def test_a_box_size_without_boxes_is_refused(client):
    response = client.post("/features", content=PHOTO, headers=PNG, params={"box_size": "7"})

    assert "without 'boxes'" in fault(response)["message"]


def test_boxes_in_query_and_body_are_refused(client):
    items = [{"data": base64.b64encode(PHOTO).decode()}]
    response = client.post(
        "/features",
        json={"images": items, "options": {"boxes": [[0, 0, 1, 1]]}},
        params={"boxes": "0,0,1,1"},
    )

    assert "both in the query and in the body" in fault(response)["message"]


def test_boxes_and_cells_are_limited(serve):
    with serve(max_image_boxes=3, max_box_cells=10) as client:
        limits = client.get("/info").json()["limits"]
        three = [[0, 0, 9, 9]] * 3
        assert post_json(client, [PHOTO, OTHER], boxes=[three, three]).status_code == 200

        many = fault(post_json(client, [PHOTO, OTHER], boxes=[[], [[0, 0, 9, 9]] * 4]))
        large = fault(post_json(client, [PHOTO], boxes=three, box_size=2))

    assert (limits["max_image_boxes"], limits["max_box_cells"]) == (3, 10)
    assert limits["max_box_size"] == 64
    assert "image 1 has 4 boxes, 3 are allowed" in many["message"]
    assert many["index"] == 1
    assert "12 cells" in large["message"]


def test_json_counts_the_values_of_the_boxes_and_not_of_the_grid(serve):
    json_only = {"accept": "application/json"}
    with serve(max_image_tokens=60_000, batch_tokens=60_000) as client:
        boxes = [[0, 0, 9, 9]]
        few = post_json(client, [PHOTO], json_only, boxes=boxes, size=[1024, 1024])
        many = post_json(client, [PHOTO], json_only, boxes=boxes * 10, box_size=64)

    assert few.status_code == 200
    assert "1310720 values" in fault(many, "response_too_large")["message"]


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


def test_boxes_are_counted(serve):
    with serve() as client:
        post(client, boxes=query_of(BOXES))
        post(client)
        text = client.get("/metrics").text

    assert "refinery_boxes_total 5.0" in text


def test_boxes_of_many_requests_share_a_batch(serve, watched_encoder):
    with serve(lambda *_: watched_encoder) as client, ThreadPoolExecutor(8) as threads:
        alone = [load(post(client, boxes=query_of([box])).content)["boxes.0"] for box in BOXES]
        watched_encoder.hold()
        first = threads.submit(post, client)
        watched_encoder.wait_until_held()
        rest = [threads.submit(post, client, boxes=query_of([box])) for box in BOXES]
        while "refinery_queue_images 5.0" not in client.get("/metrics").text:
            pass
        watched_encoder.gate.set()
        first.result()
        together = [load(future.result().content)["boxes.0"] for future in rest]

    assert [batch[0] for batch in watched_encoder.batches] == [1, 5]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=1e-3)
