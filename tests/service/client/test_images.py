"""What may be given as an image, and what is sent for it."""

import io

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from service.client import InputError
from service.client.images import Encoded, Pixels, check_is_several, read_image
from service.client.requests import Item, make_body
from tests.service.client.fake_service import pixels, take_apart
from tests.support import encoded


def sent(*images, boxes=None, **options):
    items = [Item(i, read_image(image), boxes) for i, image in enumerate(images)]
    body = make_body(items, options)
    headers = {"content-type": body.content_type}
    return body, take_apart("POST", "http://x/features", headers, body.content)


def test_files_are_sent_as_they_are(tmp_path):
    jpeg = encoded(Image.fromarray(pixels(30, 20)), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg)

    for image in (path, str(path), jpeg, bytearray(jpeg), memoryview(jpeg)):
        body, asked = sent(image, size=448)

        assert body.content_type == "application/octet-stream"
        assert asked.images == [jpeg]
        assert body.params == {"size": "448"}


def test_several_files_are_multipart_with_options_beside_them():
    files = [b"\r\n--x\r\n", b"\x00\xff" * 50, b"c"]

    body, asked = sent(*files, layers=(-1, 3), partial=True)

    assert asked.images == files
    assert asked.options == {"layers": [-1, 3], "partial": True}
    assert body.params == {}


def test_pixels_of_one_size_are_one_tensor():
    arrays = [pixels(seed=1), pixels(seed=2)]

    body, asked = sent(*arrays, layers=[1, 2], normalize=False, pool=2)

    assert body.content_type == "application/x-safetensors"
    (tensor,) = safetensors.numpy.load(body.content).values()
    assert (tensor == np.stack(arrays)).all()
    assert body.params == {"layers": "1,2", "normalize": "false", "pool": "2"}


@pytest.mark.parametrize(
    "images",
    [
        (pixels(4, 5), pixels(5, 4)),
        (pixels(4, 5), b"file"),
    ],
)
def test_other_pixels_are_lossless_files(images):
    _, asked = sent(*images)

    decoded = np.asarray(Image.open(io.BytesIO(asked.images[0])))
    assert (decoded == images[0]).all()


def test_boxes_of_pixels_are_multipart_too():
    _, asked = sent(pixels(), boxes=[(0, 0, 1, 2)])

    assert asked.options == {"boxes": [[[0, 0, 1, 2]]]}
    assert (np.asarray(Image.open(io.BytesIO(asked.images[0]))) == pixels()).all()


def test_boxes_may_be_an_array():
    _, asked = sent(b"x", boxes=np.array([[0.0, 0.0, 1.0, 2.5]]))

    assert asked.options == {"boxes": [[[0.0, 0.0, 1.0, 2.5]]]}


@pytest.mark.parametrize(
    "image",
    [
        pixels(),
        np.asfortranarray(pixels()),
        pixels(8, 10)[::2, ::2] * 0 + pixels(),
        torch.from_numpy(pixels()),
        torch.from_numpy(pixels()).permute(2, 0, 1),
        torch.from_numpy(pixels()).permute(2, 0, 1).contiguous(),
        Image.fromarray(pixels()),
    ],
)
def test_pixels_arrive_as_they_were(image):
    payload = read_image(image)

    assert isinstance(payload, Pixels)
    assert payload.array_HW3.flags.c_contiguous
    assert (payload.array_HW3 == pixels()).all()


def test_a_pil_image_is_sent_upright():
    turned = Image.fromarray(pixels())
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)

    payload = read_image(Image.open(buffer))

    assert (payload.array_HW3 == np.rot90(pixels(), -1)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_pil_image_of_another_mode_keeps_it(mode):
    if mode == "I;16":
        image = Image.fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000)
    else:
        image = Image.fromarray(pixels()).convert(mode)

    payload = read_image(image)

    assert isinstance(payload, Encoded)
    decoded = Image.open(io.BytesIO(payload.data))
    assert decoded.mode == mode
    assert (np.asarray(decoded) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (pixels().astype(np.float32), "float32"),
        (pixels()[..., :1], r"\[4, 5, 1\]"),
        (pixels().transpose(2, 0, 1), r"\[3, 4, 5\]"),
        (pixels()[None], "batch"),
        (pixels()[:0], "empty"),
        (torch.zeros(3, 4, 3, dtype=torch.uint8), "may be"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"\[4, 4\]"),
        (torch.zeros(3, 4, 5), "float32"),
        (torch.zeros(3, 4, 5, dtype=torch.int8), "int8"),
        (Image.new("HSV", (4, 4)), "HSV"),
        (b"", "0 bytes"),
        (17, "int"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_is_refused(image, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_image(image)

    assert caught.value.code == "invalid_input"


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty").touch()

    for name, reason in (("none", "No such file"), (".", "directory"), ("empty", "empty")):
        with pytest.raises(InputError, match=reason) as caught:
            read_image(tmp_path / name)
        assert caught.value.code == "unreadable_file"
        assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    "image", ["a.jpg", b"bytes", pixels(), torch.from_numpy(pixels()), Image.fromarray(pixels())]
)
def test_one_image_is_not_several(image):
    with pytest.raises(InputError, match=r"feature\(\)"):
        check_is_several(image)


def test_a_batch_is_several():
    check_is_several(pixels()[None])
    check_is_several(torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
    check_is_several([pixels()])
    check_is_several(iter([b"x"]))
