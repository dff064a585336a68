import csv
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from backbone import decoders, jpeg
from backbone.errors import (
    ImageError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)
from backbone.preprocess import (
    DECODER_VERSION,
    decode_image,
    read_image_header,
    supported_formats,
)
from tests.support import data_folder, encoded, noise_image


def test_decodes_rgb_losslessly():
    image = noise_image(5, 7)

    pixels = decode_image(encoded(image))

    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.transpose(a, (1, 0, 2)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
    8: lambda a: np.rot90(a, 1),
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", LOSSLESS)
def test_exif_orientation_is_applied(format, orientation):
    stored = noise_image(4, 6)
    data = encoded(stored, format, exif=with_orientation(orientation), **LOSSLESS[format])

    pixels = decode_image(data)

    expected = TURNS[orientation](np.asarray(stored))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert pixels.stride(0) == 1
    assert read_image_header(data).upright_size == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", *({"AVIF"} & set(supported_formats()))])
def test_exif_orientation_turns_lossy_pixels_as_stored(format, orientation):
    stored = noise_image(24, 40)
    plain = decode_image(encoded(stored, format)).permute(1, 2, 0).numpy()
    data = encoded(stored, format, exif=with_orientation(orientation))

    pixels = decode_image(data)

    expected = TURNS[orientation](plain)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert pixels.stride(0) == 1
    assert read_image_header(data).upright_size == expected.shape[:2]


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0rubbish that is no TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\0\0\0\x01\xff\xff\xff\x7f\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0\x36\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_exif_block_that_cannot_be_read_counts_as_none(exif):
    data = encoded(noise_image(4, 6), "JPEG", exif=exif)

    assert decode_image(data).shape == (3, 4, 6)
    assert read_image_header(data).upright_size == (4, 6)


def test_an_orientation_behind_the_pixels_is_not_applied():
    plain, turned = (
        encoded(noise_image(4, 6), exif=with_orientation(orientation)) for orientation in (1, 6)
    )
    start = turned.index(b"eXIf") - 4
    exif = turned[start : turned.index(b"IDAT") - 4]
    data = turned[:start] + turned[start + len(exif) : -12] + exif + turned[-12:]

    assert torch.equal(decode_image(data), decode_image(plain))
    assert read_image_header(data).upright_size == (4, 6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_common_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((4, 6), 255, dtype=np.uint8)).convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"

    pixels = decode_image(encoded(grey, format))

    assert pixels.shape == (3, 4, 6)
    assert (pixels == 255).all()


def test_transparent_pixels_are_laid_over_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))

    pixels = decode_image(encoded(image))

    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 1].tolist() == [10, 20, 30]


def test_a_transparent_palette_colour_is_laid_over_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)

    pixels = decode_image(encoded(image, transparency=0))

    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 1].tolist() == [0, 0, 200]


def test_sixteen_bit_grey_keeps_its_range():
    samples = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)

    pixels = decode_image(encoded(Image.fromarray(samples)))

    assert pixels[0, 0].tolist() == [0, 1, 128, 255]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]

    pixels = decode_image(
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    )

    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_size_is_checked_from_the_header_before_decoding():
    header_only = encoded(Image.new("L", (5000, 5000)))[:64]

    with pytest.raises(ImageTooLargeError, match=r"5000x5000 px.*1000000 are allowed"):
        decode_image(header_only, max_pixels=1_000_000)


def test_header_is_read_without_pixels():
    header = read_image_header(encoded(noise_image(30, 40), "JPEG")[:700])

    assert (header.format, header.width, header.height) == ("JPEG", 40, 30)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_the_upright_size_is_read_without_pixels(format):
    exif = with_orientation(8)
    data = encoded(noise_image(30, 400), format, exif=exif)
    pixels_at = {"PNG": data.find(b"IDAT") + 4, "JPEG": data.find(b"\xff\xda") + 16, "TIFF": None}

    header = read_image_header(data[: pixels_at[format]])

    assert header.upright_size == (400, 30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_a_file_in_millions_of_pieces_is_refused_quickly(format):
    plain = encoded(Image.new("L", (4, 4)), format)
    piece, start = {
        "JPEG": (b"\xff\xe5\x00\x02", 2),
        "PNG": (b"\0\0\0\0prVt" + zlib.crc32(b"prVt").to_bytes(4, "big"), 33),
        "GIF": (b"\x01a", plain.find(b"\x2c")),
    }[format]
    filling = piece * (8_000_000 // len(piece))
    if format == "GIF":
        filling = b"\x21\xfe" + filling + b"\0"
    started = time.process_time()

    with pytest.raises(UndecodableImageError, match="cut into more than 200000 pieces"):
        read_image_header(plain[:start] + filling + plain[start:])
    assert time.process_time() - started < 2


def test_the_decoder_version_names_all_that_makes_pixels(monkeypatch):
    names = [part.rsplit("-", 1)[0] for part in DECODER_VERSION.split()]
    monkeypatch.setattr(jpeg, "IS_AVAILABLE", False)

    without_torchvision = decoders._decoder_version()

    assert names[:3] == ["refinery", "pillow", "libjpeg-turbo"]
    assert names[-1] == "torchvision"
    assert without_torchvision.endswith("torchvision-None")
    assert without_torchvision != DECODER_VERSION


def test_a_truncated_file_is_undecodable():
    data = encoded(noise_image(64, 64))

    with pytest.raises(UndecodableImageError, match="PNG data are damaged or incomplete"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.4 not an image", b"\x00" * 100])
def test_bytes_that_are_no_image_are_unsupported(data):
    with pytest.raises(UnsupportedImageError, match="send one of JPEG"):
        decode_image(data)


def test_formats_that_are_not_listed_are_refused():
    with pytest.raises(UnsupportedImageError):
        decode_image(encoded(noise_image(4, 4), "PPM"))


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning")
def test_hostile_files_give_an_image_or_a_typed_error_quickly():
    folder = data_folder("bad_inputs")
    with (folder / "MANIFEST.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) > 200

    for row in rows:
        data = (folder / row["file"]).read_bytes()
        started = time.monotonic()
        try:
            pixels = decode_image(data)
        except ImageError:
            pixels = None
        assert time.monotonic() - started < 5, row["file"]
        if pixels is not None:
            assert row["decodable"] == "yes", row["file"]
            assert pixels.shape == (3, *read_image_header(data).upright_size), row["file"]


def test_png_text_bomb_is_refused_without_expanding():
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    plain = encoded(Image.new("L", (4, 4)))
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"0" * 100_000_000))
    data = plain[:33] + bomb + plain[33:]

    with pytest.raises(ImageError):
        decode_image(data)
