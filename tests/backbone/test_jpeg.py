import csv
import time

import numpy as np
import pytest
import torch
from PIL import Image

from backbone import jpeg
from backbone.errors import ImageError, UndecodableImageError
from backbone.preprocess import decode_image, decode_jpegs_on_device, suits_nvjpeg
from tests.support import data_folder, encoded, noise_image

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def smooth_image(height, width):
    """A picture that decoders agree on: they differ at hard edges of colour."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def segment(marker, body=b""):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def with_frame(marker, body, ahead=b""):
    """The start of a JPEG with one frame header and one scan."""
    return b"\xff\xd8" + ahead + segment(marker, body) + segment(0xDA, bytes(10)) + b"\xff\xd9"


def frame_body(*, precision=8, height=5, width=7, ids=(1, 2, 3)):
    sizes = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    components = b"".join(bytes([component, 0x11, 0]) for component in ids)
    return bytes([precision]) + sizes + bytes([len(ids)]) + components


def many_scans(height, width, num_scans):
    """A grey progressive image: one scan gives its pixels, the others say that nothing changes."""
    num_blocks = -(-height // 8) * -(-width // 8)
    tables = (
        segment(0xDB, b"\0" + b"\1" * 64),
        segment(0xC2, frame_body(height=height, width=width, ids=(1,))),
        segment(0xC4, b"\x00" + b"\1" + bytes(15) + b"\x00"),
        segment(0xC4, b"\x10" + b"\1" + bytes(15) + b"\xe0"),
    )
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-num_blocks // 8))
    # The code of a run and the 14 bits of its length; a zero keeps ff from being a marker.
    run = b"\x7f\xff\x00"
    rest = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + run * -(-num_blocks // 32767)
    return b"\xff\xd8" + b"".join(tables) + first + rest * (num_scans - 1) + b"\xff\xd9"


@pytest.fixture
def by_pillow(monkeypatch):
    """`decode_image` where torchvision has no JPEG decoder."""

    def decode(data):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "IS_AVAILABLE", False)
            return decode_image(data)

    return decode


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 95, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True, "quality": 30},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 47)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_torchvision_gives_the_pixels_of_pillow(mode, size, options, by_pillow):
    if mode == "L":
        options = {key: value for key, value in options.items() if key != "keep_rgb"}
    data = encoded(noise_image(*size).convert(mode), "JPEG", **options)
    assert jpeg.decode(data) is not None

    pixels = decode_image(data)

    expected = by_pillow(data)
    assert torch.equal(pixels, expected)
    assert pixels.stride() == expected.stride()


def test_cmyk_is_left_to_pillow(by_pillow):
    data = encoded(noise_image(9, 12).convert("CMYK"), "JPEG")
    frame = jpeg.read_frame(data)
    assert frame is not None
    assert not frame.is_plain

    assert torch.equal(decode_image(data), by_pillow(data))


def test_a_picture_for_two_eyes_gives_the_first():
    left, right = smooth_image(16, 24), noise_image(16, 24)
    data = encoded(left, "MPO", save_all=True, append_images=[right])

    pixels = decode_image(data).permute(1, 2, 0).numpy().astype(int)

    assert np.abs(pixels - np.asarray(left)).mean() < 5


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("is_progressive", [False, True])
def test_a_file_that_is_cut_off_is_undecodable(is_progressive, part):
    data = encoded(noise_image(64, 64), "JPEG", progressive=is_progressive)

    with pytest.raises(UndecodableImageError, match="JPEG data are damaged or incomplete"):
        decode_image(data[: int(len(data) * part)])


def test_what_torchvision_refuses_is_judged_by_pillow(monkeypatch, by_pillow):
    data = encoded(noise_image(9, 12), "JPEG")
    monkeypatch.setattr(jpeg, "decode", lambda _: None)

    assert torch.equal(decode_image(data), by_pillow(data))


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning")
def test_real_files_have_one_verdict_and_one_set_of_pixels(by_pillow):
    folder = data_folder("bad_inputs")
    with (folder / "MANIFEST.tsv").open() as file:
        paths = [folder / row["file"] for row in csv.DictReader(file, delimiter="\t")]
    paths += sorted(data_folder("train_images").iterdir())[::20]
    num_decoded = 0

    def outcome(decode, data):
        try:
            return decode(data)
        except ImageError as error:
            return type(error), str(error)

    for path in paths:
        data = path.read_bytes()
        if data[:2] != b"\xff\xd8":
            continue
        ours, pillows = outcome(decode_image, data), outcome(by_pillow, data)
        if isinstance(ours, torch.Tensor) and isinstance(pillows, torch.Tensor):
            assert torch.equal(ours, pillows), path
            num_decoded += 1
        else:
            assert ours == pillows, path
    assert num_decoded > 150


def test_the_frame_says_what_the_file_is():
    baseline = jpeg.read_frame(encoded(noise_image(5, 7), "JPEG"))
    progressive = jpeg.read_frame(encoded(noise_image(5, 7).convert("L"), "JPEG", progressive=True))

    assert baseline == (5, 7, 0, 8, (1, 2, 3), None)
    assert progressive is not None
    assert (progressive.process, progressive.component_ids) == (2, (1,))


@pytest.mark.parametrize(
    ("marker", "changes", "is_plain", "is_baseline"),
    [
        (0xC0, {}, True, True),
        (0xC0, {"ids": (1,)}, True, True),
        (0xC0, {"ids": (82, 71, 66)}, True, False),
        (0xC0, {"ids": (1, 2)}, False, False),
        (0xC0, {"ids": (1, 2, 3, 4)}, False, False),
        (0xC1, {}, True, False),
        (0xC1, {"precision": 12}, False, False),
        (0xC2, {}, True, False),
        (0xC3, {}, False, False),
        (0xC9, {}, False, False),
        (0xCA, {}, False, False),
    ],
)
def test_decoders_get_the_kinds_that_they_read_alike(marker, changes, is_plain, is_baseline):
    frame = jpeg.read_frame(with_frame(marker, frame_body(**changes)))

    assert frame is not None
    assert (frame.is_plain, frame.is_baseline) == (is_plain, is_baseline)


@pytest.mark.parametrize(("transform", "suits"), [(0, False), (1, True)])
def test_nvjpeg_does_not_get_rgb_in_disguise(transform, suits):
    adobe = segment(0xEE, b"Adobe" + bytes(6) + bytes([transform]))

    assert suits_nvjpeg(with_frame(0xC0, frame_body(), ahead=adobe)) is suits


def test_padding_and_rubbish_between_segments_are_passed_over():
    plain = with_frame(0xC0, frame_body())
    ahead = b"\xff\xff\xff\x01\xff\xd0\x00rubbish\xff\x00" + segment(0xE5, b"\xff\xc0\x00\x02")

    assert jpeg.read_frame(with_frame(0xC0, frame_body(), ahead)) == jpeg.read_frame(plain)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        with_frame(0xC0, b""),
        with_frame(0xC0, frame_body()[:-1]),
        with_frame(0xC0, frame_body() + b"\0"),
        with_frame(0xC0, frame_body(), ahead=segment(0xC0, frame_body(height=9))),
        with_frame(0xC0, frame_body(), ahead=b"\xff\xd8"),
        with_frame(0xC0, frame_body(), ahead=b"\xff\xe0\x00\x01"),
        with_frame(0xC0, frame_body(), ahead=b"\xff\xe0\xff\xff"),
        b"\xff\xd8" + segment(0xC0, frame_body()),
    ],
)
def test_a_file_that_is_not_one_frame_and_a_scan_has_no_frame(data):
    assert jpeg.read_frame(data) is None
    assert not suits_nvjpeg(data)


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xd0", b"\xff\x00", b"\xff\xe5\x00\x02", b"\0"])
def test_megabytes_of_nothing_are_walked_through_quickly(filling):
    ahead = filling * (8_000_000 // len(filling))
    data = with_frame(0xC0, frame_body(), ahead)
    started = time.process_time()

    jpeg.read_frame(data)

    assert time.process_time() - started < 1


def test_as_many_scans_as_allowed_are_decoded():
    pixels = decode_image(many_scans(8, 24, jpeg.MAX_SCANS))

    assert pixels.shape == (3, 8, 24)
    assert (pixels == 128).all()


def test_an_image_of_endless_scans_is_refused_before_it_costs_time():
    data = many_scans(5000, 8000, 100_000)
    started = time.process_time()

    with pytest.raises(UndecodableImageError, match="more than 100 scans"):
        decode_image(data)
    assert time.process_time() - started < 2


def test_scans_are_not_hidden_behind_other_segments():
    data = many_scans(8, 8, 200)

    assert jpeg.has_too_many_scans(data[:2] + segment(0xE5) * 20_000 + data[2:])


def test_a_film_clip_behind_the_image_is_no_scan(by_pillow):
    still = encoded(noise_image(9, 12), "JPEG")

    assert torch.equal(decode_image(still + b"\xff\xda\x00\x02" * 500), by_pillow(still))


def test_a_batch_keeps_its_order_and_leaves_out_what_is_damaged():
    first, last = (encoded(noise_image(9, 12, seed), "JPEG") for seed in (1, 2))
    cut = first[: len(first) // 2]
    broken = cut + b"\xff\xd9" * 2
    broken = broken[:2] + broken[30:]

    decoded = jpeg.decode_batch([first, cut, broken, last + b"\0film"], torch.device("cpu"))

    assert [pixels is None for pixels in decoded] == [False, True, True, False]
    assert torch.equal(decoded[0], decode_image(first))
    assert torch.equal(decoded[3], decode_image(last))
    assert jpeg.decode_batch([], torch.device("cpu")) == []


def test_any_mix_of_files_becomes_pixels_or_errors_in_order():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(smooth_image(20, 30), "JPEG", exif=exif)
    datas = [
        encoded(noise_image(9, 12), "PNG"),
        turned,
        turned[:-50],
        b"nothing",
        encoded(noise_image(9, 12), "JPEG", progressive=True),
        encoded(noise_image(40, 40), "JPEG"),
    ]

    results = decode_jpegs_on_device(datas, torch.device("cpu"), max_pixels=1000)

    for index in (0, 1, 4):
        assert torch.equal(results[index], decode_image(datas[index]))
    assert [type(results[index]).__name__ for index in (2, 3, 5)] == [
        "UndecodableImageError",
        "UnsupportedImageError",
        "ImageTooLargeError",
    ]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_nvjpeg_is_close_to_libjpeg(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = smooth_image(120, 200).convert(mode)
    datas = [encoded(image, "JPEG", quality=95), encoded(image, "JPEG", quality=95, exif=exif)]

    results = decode_jpegs_on_device(datas, torch.device("cuda"))

    for pixels, data in zip(results, datas, strict=True):
        assert isinstance(pixels, torch.Tensor)
        assert pixels.is_cuda
        expected = decode_image(data)
        assert pixels.shape == expected.shape
        assert (pixels.cpu().int() - expected.int()).abs().float().mean() < 1


@pytest.mark.gpu
@GPU
def test_a_damaged_file_does_not_cost_nvjpeg_the_others():
    good = encoded(smooth_image(64, 64), "JPEG")
    broken = good[:2] + good[30 : len(good) // 2] + b"\xff\xd9"

    first, bad, last = decode_jpegs_on_device([good, broken, good], torch.device("cuda"))

    assert isinstance(bad, ImageError)
    assert torch.equal(first, last)
