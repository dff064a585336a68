import numpy as np
import pytest
import torch
from PIL import Image

from backbone.errors import (
    ImageSizeError,
    UnsupportedImageError,
)
from backbone.preprocess import (
    can_resize_on_cuda,
    decode_image,
    load_image,
    normalize,
    patch_affine,
    resize_image,
    resolve_size,
)
from tests.support import encoded, noise_image


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


def test_a_batch_is_resized_image_by_image():
    images = [decode_image(encoded(noise_image(90, 130, seed))) for seed in range(3)]

    batch = resize_image(torch.stack(images), (48, 64))

    assert torch.equal(batch, torch.stack([resize_image(image, (48, 64)) for image in images]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [(48, 64), (16, 16), (180, 260)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("num_images", [None, 3])
def test_cuda_resizes_within_one_level_of_a_cpu(num_images, interpolation, size):
    pixels = decode_image(encoded(noise_image(130, 190)))
    if num_images is not None:
        pixels = pixels.expand(num_images, -1, -1, -1)

    on_device = resize_image(pixels.cuda(), size, interpolation)

    assert on_device.is_cuda
    expected = resize_image(pixels, size, interpolation)
    assert (on_device.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("original", [(16 * 8, 16 * 8), (16 * 8 + 1, 64), (16, 5000)])
def test_cuda_takes_any_reduction(original):
    pixels = decode_image(encoded(noise_image(*original)))

    on_device = resize_image(pixels.cuda(), (16, 16))

    assert (on_device.cpu().int() - resize_image(pixels, (16, 16)).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("original", "resized", "can"),
    [
        ((512, 512), (64, 64), True),
        ((513, 512), (64, 64), False),
        ((512, 513), (64, 64), False),
        ((16, 16), (512, 512), True),
    ],
)
def test_cuda_reduces_eight_times_at_most(original, resized, can):
    assert can_resize_on_cuda(original, resized) is can


def test_normalize_is_mean_and_std_per_channel():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)

    out = normalize(pixels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).flatten()

    expected = torch.tensor([(0 - 0.5) / 0.2, (128 / 255 - 0.4) / 0.3, (1 - 0.3) / 0.4])
    torch.testing.assert_close(out, expected)


def test_affine_maps_image_corners_to_grid_corners():
    affine = np.array(patch_affine((300, 400), (48, 64), 16))

    assert np.allclose(affine @ [0, 0, 1], [0, 0])
    assert np.allclose(affine @ [400, 300, 1], [4, 3])
