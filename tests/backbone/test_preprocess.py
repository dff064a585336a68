import csv
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.errors import (
    ImageError,
    ImageSizeError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)
from backbone.preprocess import (
    decode_image,
    load_image,
    normalize,
    patch_affine,
    read_image_header,
    resize_image,
    resolve_size,
)
from tests.support import data_folder, encoded, noise_image


def test_decodes_rgb_losslessly():
    image = noise_image(5, 7)

    pixels = decode_image(encoded(image))

    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored = noise_image(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation

    pixels = decode_image(encoded(stored, exif=exif))

    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.transpose(a, (1, 0, 2)),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), turn(np.asarray(stored)))


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


def test_load_image_names_the_file(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")

    with pytest.raises(UnsupportedImageError, match="broken.png"):
        load_image(path)


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((480, 640), 320, (240, 320)),
        ((640, 480), 320, (320, 240)),
        ((100, 1000), 160, (16, 160)),
        ((1, 1000), 64, (16, 64)),
        ((333, 500), 500, (336, 496)),
        ((50, 60), (32, 48), (32, 48)),
    ],
)
def test_sizes_are_whole_patches(image, size, expected):
    assert resolve_size(*image, size, 16) == expected


@pytest.mark.parametrize("size", [15, 0, -16, (16, 20), (0, 16), (-16, 16), (16,), (16, 16, 16)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ImageSizeError):
        resolve_size(100, 100, size, 16)


def test_a_size_between_patches_names_the_nearest():
    with pytest.raises(ImageSizeError, match="ask for 48x32"):
        resolve_size(100, 100, (50, 30), 16)


def test_resizing_matches_pillow_within_one_level():
    image = noise_image(90, 130)

    ours = resize_image(decode_image(encoded(image)), (48, 64))

    theirs = np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
    assert difference.max() <= 1


def test_normalize_is_mean_and_std_per_channel():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)

    out = normalize(pixels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).flatten()

    expected = torch.tensor([(0 - 0.5) / 0.2, (128 / 255 - 0.4) / 0.3, (1 - 0.3) / 0.4])
    torch.testing.assert_close(out, expected)


def test_affine_maps_image_corners_to_grid_corners():
    affine = np.array(patch_affine((300, 400), (48, 64), 16))

    assert np.allclose(affine @ [0, 0, 1], [0, 0])
    assert np.allclose(affine @ [400, 300, 1], [4, 3])


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
            assert pixels.ndim == 3
            assert pixels.shape[0] == 3


def test_png_text_bomb_is_refused_without_expanding():
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    plain = encoded(Image.new("L", (4, 4)))
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"0" * 100_000_000))
    data = plain[:33] + bomb + plain[33:]

    with pytest.raises(ImageError):
        decode_image(data)
