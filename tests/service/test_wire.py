import base64
import io
import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load

from backbone import errors as backbone_errors
from service import errors, wire
from service.options import FeatureOptions
from tests.service.feature_maps import answer, noise, regions, source

SAFETENSORS, FRAMES = "application/x-safetensors", "application/x-refinery-frames"
NPY, RAW, JSON, PNG = (
    "application/x-npy",
    "application/octet-stream",
    "application/json",
    "image/png",
)
DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
BOXES = ((0.0, 0.0, 1.0, 1.0), (0.2, 0.2, 0.6, 0.9))


def body(media, answers, source):
    parts, _ = wire.serialise(media, answers, source)
    return b"".join(parts)


def tensors_of(answer):
    return [part.tensor for part in answer.image.parts]


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])


def metadata_of(data):
    return header_of(data)["__metadata__"]


def failure(index, error=None):
    return wire.ImageFailure(index, error or errors.UndecodableImageError("it is cut off"))


# --- safetensors


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_safetensors_hold_every_image_and_say_where_it_lies(dtype):
    given = source(dtype=dtype, normalize=True)
    answers = [answer(given, 0), answer(given, 1, grid=(3, 2))]

    data = body(SAFETENSORS, answers, given)

    loaded = safetensors.torch.load(data)
    assert sorted(loaded) == ["features.0", "features.1"]
    torch.testing.assert_close(loaded["features.1"], tensors_of(answers[1])[0], rtol=0, atol=0)
    assert loaded["features.0"].dtype == DTYPES[dtype]
    images = json.loads(metadata_of(data)["images"])
    assert images[0] == {
        "index": 0,
        "grid": [2, 3],
        "original_size": [64, 96],
        "resized_to": [32, 48],
        "bucket": "32x48",
        "affine": [[0.03125, 0.0, 0.0], [0.0, 0.03125, 0.0]],
    }
    assert images[1]["index"] == 1


def test_the_metadata_says_what_the_features_are_and_is_all_text():
    given = source(layers=(5, 11), dtype="bfloat16", layout="nchw", normalize=True)

    metadata = metadata_of(body(SAFETENSORS, [answer(given)], given))

    assert {name: text for name, text in metadata.items() if name != "images"} == {
        "model": "demo",
        "model_digest": "abc",
        "patch_size": "16",
        "layers": "[5,11]",
        "dtype": "bfloat16",
        "layout": "nchw",
        "normalize": "true",
    }
    assert isinstance(metadata["images"], str)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"pool": "mean"}, "mean"), ({"pool": 2}, "2"), ({"project": 3}, "3")],
)
def test_the_metadata_says_how_features_were_reduced(options, said):
    given = source(**options)

    metadata = metadata_of(body(SAFETENSORS, [answer(given)], given))

    assert metadata[next(iter(options))] == said


@pytest.mark.parametrize(
    ("pool", "corner"), [("none", (3.0, 2.0)), (2, (1.5, 1.0)), ("mean", (1.0, 1.0))]
)
def test_the_affine_leads_from_the_image_to_the_grid_that_is_sent(pool, corner):
    given = source(pool=pool)

    (image,) = json.loads(metadata_of(body(SAFETENSORS, [answer(given)], given))["images"])

    height, width = image["original_size"]
    assert tuple(np.array(image["affine"]) @ [width, height, 1]) == corner
    assert image["grid"] == [int(np.ceil(corner[1])), int(np.ceil(corner[0]))]


def test_the_metadata_of_boxes_says_how_many_and_how_large():
    boxes = regions(*BOXES, box_size=2)
    given = source(boxes=((),), box_size=2)

    metadata = metadata_of(body(SAFETENSORS, [answer(given, boxes=boxes)], given))

    assert metadata["box_size"] == "2"
    assert json.loads(metadata["images"])[0]["num_boxes"] == 2


def test_several_layers_are_named_by_their_block():
    given = source(layers=(5, 11), dtype="float32")
    sent = answer(given)

    loaded = load(body(SAFETENSORS, [sent], given))

    assert set(loaded) == {"features.0.layer5", "features.0.layer11"}
    np.testing.assert_array_equal(loaded["features.0.layer11"], tensors_of(sent)[1])


@pytest.mark.parametrize(("layers", "suffix"), [((3,), ""), ((3, 7), ".layer7")])
def test_each_kind_of_tensor_has_its_name(layers, suffix):
    given = source(layers=layers, dtype="int8", project=2, include=("cls", "registers", "spurious"))
    parts = {"registers_RC": noise(14, 4), "spurious_N2": noise(6, 2)}

    loaded = load(body(SAFETENSORS, [answer(given, 4, **parts)], given))

    kinds = ("features", "cls", "registers", "spurious", "basis", "mean")
    names = {f"{kind}.4{suffix}" for kind in kinds} | {f"features.4{suffix}.scale"}
    assert names <= set(loaded)
    assert len(loaded) == len(names) * len(layers)


def test_tensors_of_all_widths_are_aligned_and_without_gaps():
    given = source(layers=(0, 1), dtype="int8", project=3, include=("cls", "spurious"))
    odd = {"grid": (3, 5), "channels": 7, "spurious_N2": noise(15, 2)}
    answers = [answer(given, index, **odd) for index in range(3)]

    data = body(SAFETENSORS, answers, given)

    loaded = safetensors.torch.load(data)
    sent = {
        given.name(part, image.index): part.tensor
        for image in answers
        for part in image.image.parts
    }
    assert loaded.keys() == sent.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    entries = {name: entry for name, entry in header_of(data).items() if name != "__metadata__"}
    for name, entry in entries.items():
        assert (start + entry["data_offsets"][0]) % sent[name].element_size() == 0, name
    offsets = sorted(entry["data_offsets"] for entry in entries.values())
    assert [first for first, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert start + offsets[-1][1] == len(data)


def test_a_tensor_without_elements_and_one_without_axes_are_sent():
    given = source(dtype="int8", pool="mean", include=("cls",))
    sent = answer(given, prefix_PC=torch.zeros(0, 4))

    loaded = safetensors.torch.load(body(SAFETENSORS, [sent], given))

    assert loaded["cls.0"].shape == (0, 4)
    assert loaded["features.0.scale"].shape == ()


@pytest.mark.parametrize("media", [SAFETENSORS, NPY, RAW])
def test_large_tensors_are_sent_out_of_their_own_memory(media):
    given = source(dtype="float32")
    sent = answer(given, grid=(256, 256), channels=16)  # 4 MiB
    (tensor,) = tensors_of(sent)

    parts, _ = wire.serialise(media, [sent], given)

    assert np.frombuffer(parts[-1], np.uint8).ctypes.data == tensor.data_ptr()
    assert len(parts[-1]) == tensor.nbytes
    assert sum(map(len, parts[:-1])) < 4096


def test_a_frame_is_sent_out_of_the_tensors_memory_too():
    given = source(dtype="float32")
    sent = answer(given, grid=(64, 64), channels=16)

    parts = wire.frame(sent, given)

    assert np.frombuffer(parts[-1], np.uint8).ctypes.data == tensors_of(sent)[0].data_ptr()


def test_a_small_answer_is_one_part():
    given = source()

    parts, _ = wire.serialise(SAFETENSORS, [answer(given, index) for index in range(9)], given)

    assert len(parts) == 1


# --- failures of single images


def test_safetensors_list_the_images_that_failed_and_hold_the_others():
    given = source(partial=True)
    answers = [failure(0), answer(given, 1), failure(2, errors.EncodingFailedError("no"))]

    data = body(SAFETENSORS, answers, given)

    assert set(load(data)) == {"features.1"}
    images = json.loads(metadata_of(data)["images"])
    assert [image["index"] for image in images] == [0, 1, 2]
    assert images[0]["error"] == {
        "code": "undecodable_image",
        "message": "it is cut off",
        "retryable": False,
        "index": 0,
    }
    assert "error" not in images[1]
    assert images[2]["error"]["code"] == "encoding_failed"


def test_safetensors_of_failures_alone_can_still_be_read():
    data = body(SAFETENSORS, [failure(0)], source(partial=True))

    assert load(data) == {}
    assert "error" in json.loads(metadata_of(data)["images"])[0]


def test_json_lists_the_images_that_failed():
    given = source(partial=True)
    late = errors.DeadlineError("too late")

    document = json.loads(body(JSON, [answer(given, 0), failure(1, late)], given))

    assert document["images"][0]["features"]
    assert document["images"][1] == {
        "index": 1,
        "error": {
            "code": "deadline_exceeded",
            "message": "too late",
            "retryable": True,
            "index": 1,
        },
    }


def test_a_failure_of_the_image_itself_is_listed_with_its_code():
    known = errors.about_image(backbone_errors.UndecodableImageError("damaged"), 3)

    assert failure(3, known).describe()["error"]["message"] == "image 3: damaged"


# --- frames


def test_a_frame_is_its_length_and_a_safetensors_file_of_one_image():
    given = source(layers=(0, 1))
    sent = answer(given, 7)

    data = b"".join(wire.frame(sent, given))

    (length,) = struct.unpack("<Q", data[:8])
    assert length == len(data) - 8
    assert set(load(data[8:])) == {"features.7.layer0", "features.7.layer1"}
    metadata = metadata_of(data[8:])
    assert metadata["index"] == "7"
    assert "error" not in metadata
    assert [image["index"] for image in json.loads(metadata["images"])] == [7]


def test_the_frame_of_a_failed_image_has_no_tensors_and_says_why():
    data = b"".join(wire.frame(failure(7), source()))

    assert int.from_bytes(data[:8], "little") == len(data) - 8 > 0
    assert load(data[8:]) == {}
    metadata = metadata_of(data[8:])
    assert metadata["index"] == "7"
    assert json.loads(metadata["error"]) == {
        "code": "undecodable_image",
        "message": "it is cut off",
        "retryable": False,
        "index": 7,
    }


def test_only_frames_have_their_index_and_error_at_the_top():
    given = source(partial=True)

    metadata = metadata_of(body(SAFETENSORS, [failure(0), answer(given, 1)], given))

    assert not {"index", "error"} & metadata.keys()


# --- one array


@pytest.mark.parametrize(
    ("layout", "shape"), [("grid", (2, 2, 3, 4)), ("tokens", (2, 6, 4)), ("nchw", (2, 4, 2, 3))]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_is_one_array_with_an_image_axis(layout, shape, dtype):
    given = source(layout=layout, dtype=dtype)
    answers = [answer(given, 0), answer(given, 1)]

    array = np.load(io.BytesIO(body(NPY, answers, given)))

    assert (array.shape, array.dtype) == (shape, dtype)
    np.testing.assert_array_equal(array[1], np.squeeze(tensors_of(answers[1])[0].numpy()))


@pytest.mark.parametrize(
    ("options", "boxes", "shape"),
    [
        ({"pool": "mean"}, None, (2, 4)),
        ({"pool": "mean", "layout": "nchw"}, None, (2, 4)),
        ({"pool": 2, "layout": "nchw"}, None, (2, 4, 1, 2)),
        ({"boxes": ((), ())}, 1, (2, 2, 4)),
        ({"boxes": ((), ()), "layout": "nchw"}, 1, (2, 2, 4)),
        ({"boxes": ((), ()), "layout": "nchw", "box_size": 3}, 3, (2, 2, 4, 3, 3)),
        ({"boxes": ((), ()), "layout": "tokens", "box_size": 3}, 3, (2, 2, 9, 4)),
    ],
)
def test_one_array_of_what_is_no_grid_has_an_image_axis_too(options, boxes, shape):
    given = source(**options)
    wanted = regions(*BOXES, box_size=boxes) if boxes else None
    answers = [answer(given, index, boxes=wanted) for index in range(2)]

    array = np.load(io.BytesIO(body(NPY, answers, given)))

    assert array.shape == shape
    expected = [tensor.numpy() for sent in answers for tensor in tensors_of(sent)]
    np.testing.assert_array_equal(array.ravel(), np.concatenate([one.ravel() for one in expected]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_raw_bytes_come_with_shape_and_dtype_in_headers(dtype):
    given = source(dtype=dtype, layout="tokens")
    answers = [answer(given, index) for index in range(2)]

    parts, headers = wire.serialise(RAW, answers, given)

    assert (headers["x-shape"], headers["x-dtype"]) == ("2,6,4", dtype)
    array = torch.frombuffer(bytearray(b"".join(parts)), dtype=DTYPES[dtype]).reshape(2, 6, 4)
    torch.testing.assert_close(array, torch.stack([tensors_of(a)[0] for a in answers]))
    assert [image["index"] for image in json.loads(headers["x-features"])] == [0, 1]


def test_many_images_are_not_described_in_a_header():
    given = source(pool="mean")

    _, few = wire.serialise(RAW, [answer(given, index) for index in range(8)], given)
    _, many = wire.serialise(RAW, [answer(given, index) for index in range(9)], given)

    assert len(json.loads(few["x-features"])) == 8
    assert "x-features" not in many
    assert many["x-shape"] == "9,4"


@pytest.mark.parametrize("media", [NPY, RAW])
def test_images_of_several_shapes_do_not_fit_one_array(media):
    given = source()

    with pytest.raises(errors.InvalidOptionError, match=r"2 shapes do not fit one .*safetensors"):
        body(media, [answer(given), answer(given, 1, grid=(3, 2))], given)


# --- what a format cannot hold is refused before anything is computed


def check(media, *, num_images=1, num_layers=1, **options):
    wire.check_format(
        media, FeatureOptions(**options), num_images=num_images, num_layers=num_layers
    )


@pytest.mark.parametrize("media", [SAFETENSORS, FRAMES, JSON])
def test_formats_of_many_tensors_hold_everything(media):
    check(
        media,
        num_images=9,
        num_layers=3,
        dtype="int8",
        project=2,
        include=("cls",),
        partial=True,
    )
    check(media, dtype="bfloat16", pool="mean")


@pytest.mark.parametrize(
    ("medias", "options", "message"),
    [
        ((NPY, RAW, PNG), {"num_layers": 2}, "2 layers do not fit"),
        ((NPY, RAW, PNG), {"include": ("cls",)}, "'include' gives several tensors"),
        ((NPY, RAW, PNG), {"project": 2}, "'project' gives several tensors"),
        ((NPY, RAW, PNG), {"partial": True}, "'partial' lists errors per image"),
        ((NPY, RAW, PNG), {"dtype": "int8"}, "int8 has scales"),
        ((NPY,), {"dtype": "bfloat16"}, "ask for dtype float16 or float32"),
        ((PNG,), {"num_images": 2}, "one image, not 2"),
        ((PNG,), {"boxes": (((0.0, 0.0, 1.0, 1.0),),)}, "leave out option 'boxes'"),
        ((PNG,), {"pool": "mean"}, "leave out option 'pool'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_to_do(medias, options, message):
    for media in medias:
        with pytest.raises(errors.InvalidOptionError, match=message):
            check(media, **options)


@pytest.mark.parametrize(
    ("media", "options"),
    [
        (NPY, {"num_images": 9, "dtype": "float32", "pool": 2}),
        (RAW, {"num_images": 9, "dtype": "bfloat16", "pool": "mean"}),
        (PNG, {"pool": 2}),
    ],
)
def test_what_a_format_can_hold_is_not_refused(media, options):
    check(media, **options)


# --- JSON


def test_json_carries_base64_with_shape_and_type():
    given = source()
    sent = answer(given)

    document = json.loads(body(JSON, [sent], given))

    (found,) = document["images"][0]["features"]
    array = np.frombuffer(base64.b64decode(found["data"]), document["dtype"])
    np.testing.assert_array_equal(array.reshape(found["shape"]), tensors_of(sent)[0])
    assert document["images"][0]["grid"] == [2, 3]
    assert (found["layer"], found["dtype"]) == (1, "F16")
    assert (document["model"], document["layers"], document["normalize"]) == ("demo", [1], False)


def test_json_lists_each_kind_of_tensor_by_layer():
    given = source(layers=(3, 7), dtype="int8", include=("cls",), project=2)
    sent = answer(given)

    (image,) = json.loads(body(JSON, [sent], given))["images"]

    for kind in ("features", "scale", "cls", "basis", "mean"):
        assert [found["layer"] for found in image[kind]] == [3, 7], kind
    types = {"features": "I8", "scale": "F32", "cls": "F16", "basis": "F32", "mean": "F32"}
    for part in sent.image.parts:
        found = image[part.kind][part.layer]
        assert (found["dtype"], found["shape"]) == (types[part.kind], list(part.tensor.shape))
        assert base64.b64decode(found["data"]) == part.tensor.numpy().tobytes()


PLENTY = {"num_images": 1, "max_bytes": 1 << 40}


def test_json_is_refused_beyond_a_million_values():
    options = FeatureOptions()
    wire.check_response_size(JSON, 1_000_000, options, **PLENTY)
    wire.check_response_size(NPY, 1_000_001, options, **PLENTY)

    with pytest.raises(errors.ResponseTooLargeError, match="safetensors, or for a smaller size"):
        wire.check_response_size(JSON, 1_000_001, options, **PLENTY)


def test_advice_on_too_large_json_of_boxes_is_about_boxes():
    options = FeatureOptions(boxes=(((0.0, 0.0, 1.0, 1.0),),))

    with pytest.raises(errors.ResponseTooLargeError, match="fewer boxes or a smaller box_size"):
        wire.check_response_size(JSON, 1_000_001, options, **PLENTY)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_answers_are_refused_by_their_bytes_and_frames_by_those_of_an_image(dtype, size):
    options = FeatureOptions(dtype=dtype)
    limits = {"num_images": 2, "max_bytes": 100 * size}

    wire.check_response_size(SAFETENSORS, 100, options, **limits)
    wire.check_response_size(FRAMES, 200, options, **limits)
    with pytest.raises(errors.ResponseTooLargeError, match="frames"):
        wire.check_response_size(SAFETENSORS, 101, options, **limits)
