"""The options `boxes` and `box_size`: how they are written, what is refused, and the limits."""

import base64
import io

import numpy as np
import pytest
from safetensors.numpy import load

from tests.service.box_requests import OTHER, PHOTO, PNG, fault, post, post_json

TOO_MANY = "too_many_boxes"


@pytest.mark.parametrize(
    "written",
    [
        {"boxes": "1,2,30,40,5,6,70.5,8e1"},
        {"boxes": "[1, 2, 30, 40, 5, 6, 70.5, 80]"},
        {"boxes": ["1,2,30,40", "5,6,70.5,80"]},
        {"boxes": "[[1,2,30,40],[5,6,70.5,80]]"},
        {"boxes": " [ [1, 2, 30, 40] , [5, 6, 70.5, 80]]"},
        {"boxes": "[[[1,2,30,40],[5,6,70.5,80]]]"},
        {"boxes": ["[[1,2,30,40]]", "[5,6,70.5,80]"]},
    ],
)
def test_boxes_of_one_image_read_the_same_from_query_and_body(client, written):
    boxes = [[1, 2, 30, 40], [5, 6, 70.5, 80]]
    flat = load(post_json(client, [PHOTO], boxes=boxes).content)["features.0"]
    listed = load(post_json(client, [PHOTO], boxes=[boxes]).content)["features.0"]

    np.testing.assert_array_equal(load(post(client, **written).content)["features.0"], flat)
    np.testing.assert_array_equal(listed, flat)


@pytest.mark.parametrize("boxes", [[], [[]]])
def test_an_image_may_have_no_boxes(client, boxes):
    response = post_json(client, [PHOTO], boxes=boxes, box_size=2)

    assert load(response.content)["features.0"].shape == (0, 2, 2, 32)
    in_json = post_json(client, [PHOTO], {"accept": "application/json"}, boxes=boxes)
    (sent,) = in_json.json()["images"][0]["features"]
    assert sent == {"layer": 1, "shape": [0, 32], "dtype": "F16", "data": ""}
    in_npy = post_json(client, [PHOTO], {"accept": "application/x-npy"}, boxes=boxes)
    assert np.load(io.BytesIO(in_npy.content)).shape == (1, 0, 32)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 3]], "box 0 of image 0 is [1, 2, 3], not 4 finite numbers"),
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5]], "box 1 of image 0"),
        ([[[1, 2, 3, 4], [1, 2, 3, "x"]]], "box 1 of image 0 is [1, 2, 3, 'x']"),
        ([[1, 2, 3, None]], "box 0 of image 0"),
        ([[1, 2, 3, True]], "box 0 of image 0"),
        ([1, 2, 3, 4], "1 is no list of boxes"),
        ("0 0 1 1", "option 'boxes' is '0 0 1 1'; wanted: a list of [x0, y0, x1, y1]"),
        ({"a": 1}, "option 'boxes' is {...}; wanted: a list"),
        (7, "option 'boxes' is 7"),
        ([[[1, 2, 3, 4]], [[1, 2, 3, 4]]], "lists of boxes: 2, images: 1"),
        ([[0, 0, 10, 500]], "box 0 of image 0 is [0.0, 0.0, 10.0, 500.0]: it reaches further"),
        ([[0, 0, 1, 1], [-1e30, 0, 1, 1]], "box 1 of image 0"),
        ([[40, 20, 6, 30]], "give x0, y0, x1, y1 (not x, y, width, height)"),
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
        ("[[1,2,3]]", "box 0 of image 0 is [1, 2, 3]"),
        ("[[1,2,3,4]", "option 'boxes' is '[[1,2,3,4]', which begins like JSON but is none"),
        ("[[1,2,NaN,4]]", "begins like JSON but is none"),
        ("[[1,2,3,4],5]", "box 1 of image 0 is 5"),
    ],
)
def test_impossible_boxes_in_the_query_are_refused(client, boxes, message):
    response = client.post("/features", content=PHOTO, headers=PNG, params={"boxes": boxes})

    assert message in fault(response)["message"]


def test_several_images_need_a_list_each(client):
    flat = fault(post_json(client, [PHOTO, OTHER], boxes=[[0, 0, 1, 1]]))["message"]
    empty = fault(post_json(client, [PHOTO, OTHER], boxes=[]))["message"]
    no_list = fault(post_json(client, [PHOTO, OTHER], boxes=[[[0, 0, 1, 1]], 5]))["message"]

    assert "lists of boxes: 1, images: 2" in flat
    assert "several images need a list each" in flat
    assert "in the JSON options: [[[x0, y0, x1, y1]], []]" in flat
    assert "lists of boxes: 0, images: 2" in empty
    assert "5 is no list of boxes" in no_list


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


def test_boxes_and_their_vectors_are_limited(serve):
    with serve(max_image_boxes=3, max_box_vectors=10) as client:
        limits = client.get("/info").json()["limits"]
        three = [[0, 0, 9, 9]] * 3
        assert post_json(client, [PHOTO, OTHER], boxes=[three, three]).status_code == 200

        many = fault(post_json(client, [PHOTO, OTHER], boxes=[[], [[0, 0, 9, 9]] * 4]), TOO_MANY)
        large = fault(post_json(client, [PHOTO], boxes=three, box_size=2), TOO_MANY)
        layers = fault(
            post_json(client, [PHOTO, OTHER], boxes=[three, three], layers=[0, 1]), TOO_MANY
        )
        lists = fault(post_json(client, [PHOTO], boxes=[[0, 0, 9, 9]] * 60))

    assert (limits["max_image_boxes"], limits["max_box_vectors"]) == (3, 10)
    assert limits["max_box_size"] == 64
    assert "image 1 has 4 boxes, 3 are allowed" in many["message"]
    assert many["index"] == 1
    assert "the boxes ask for 12 vectors" in large["message"]
    assert "the boxes ask for 12 vectors" in layers["message"]
    assert "62 lists, 58 are allowed; ask for fewer boxes" in lists["message"]


def test_json_counts_the_values_of_the_boxes_and_not_of_the_grid(serve):
    json_only = {"accept": "application/json"}
    with serve(max_image_tokens=60_000, batch_tokens=60_000) as client:
        boxes = [[0, 0, 9, 9]]
        few = post_json(client, [PHOTO], json_only, boxes=boxes, size=[1024, 1024])
        many = post_json(client, [PHOTO], json_only, boxes=boxes * 10, box_size=64)

    assert few.status_code == 200
    message = fault(many, "response_too_large")["message"]
    assert "1310720 values" in message
    assert "fewer boxes or a smaller box_size" in message
