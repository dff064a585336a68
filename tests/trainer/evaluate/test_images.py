import pytest
import torch
from PIL import Image

from tests.support import noise_image
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.images import ShortSide, check_size, original_size, read_image, resolve


def test_an_image_is_read_as_rgb_at_the_size_asked_for(tmp_path):
    noise_image(20, 30).convert("L").save(tmp_path / "grey.png")

    pixels = read_image(tmp_path / "grey.png", (16, 24))

    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 16, 24))
    assert torch.equal(pixels[0], pixels[2])


def test_the_size_is_the_one_that_labels_have_whatever_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise_image(20, 30).save(tmp_path / "turned.jpg", exif=exif)
    path = tmp_path / "turned.jpg"

    assert original_size(path, path.read_bytes()) == (20, 30)


@pytest.mark.parametrize(
    ("original", "patch_size", "expected"),
    [
        ((300, 450), 16, (224, 336)),
        ((450, 300), 14, (336, 224)),
        ((300, 301), 16, (224, 224)),
        ((1000, 10), 16, (22400, 224)),
    ],
)
def test_the_short_side_keeps_the_aspect_in_whole_patches(original, patch_size, expected):
    assert resolve(ShortSide(224), original, patch_size) == expected


def test_a_short_side_that_is_no_whole_patch_is_rounded():
    check_size(ShortSide(100), 16, "raw")

    assert resolve(ShortSide(100), (300, 300), 16) == (96, 96)


def test_a_size_says_which_backbone_it_does_not_fit():
    check_size((28, 56), 14, "raw")

    with pytest.raises(EvaluationError, match="refined's 16 px patches; ask for 32x64, or by --sh"):
        check_size((28, 56), 16, "refined")
