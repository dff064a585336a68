import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.evaluate.datasets.trees import write_depth, write_image
from trainer.evaluate.datasets import DatasetError, DepthDataset, Sample
from trainer.evaluate.datasets.nyu import EIGEN_CROP


@pytest.fixture
def sample(tmp_path):
    image = write_image(tmp_path / "a.jpg")
    return Sample("a", image, write_depth(tmp_path / "a.png", (0, 1500, 65535)))


def dataset(**changes):
    return DepthDataset("tiny", "folder", (), (), min_depth=1e-3, max_depth=10, **changes)


def in_metres(sample, array):
    target = sample.target.with_suffix(".npy")
    np.save(target, array)
    return Sample("a", sample.image, target)


def test_millimetres_become_metres_and_nothing_is_cut_off(sample):
    depth_HW = dataset().read_depth(sample)

    assert depth_HW.dtype == torch.float32
    assert depth_HW.shape == (4, 6)
    torch.testing.assert_close(depth_HW.flatten()[:3], torch.tensor([0, 1.5, 65.535]))


def test_a_file_may_have_other_units(sample):
    depth_HW = dataset(units_per_metre=256.0).read_depth(sample)

    assert depth_HW.flatten()[1].item() == 1500 / 256


def test_a_map_without_measurements_is_all_zero(sample):
    write_depth(sample.target, 0)

    assert not dataset().read_depth(sample).any()


def test_arrays_hold_metres_and_nan_is_no_measurement(sample):
    array = np.full((4, 6), 2.5)
    array[0, :3] = np.nan, np.inf, 0

    depth_HW = dataset(units_per_metre=256.0).read_depth(in_metres(sample, array))

    assert depth_HW.dtype == torch.float32
    assert depth_HW.flatten()[:4].tolist() == [0, 0, 0, 2.5]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 6), 1500, np.uint16), r"a\.npy holds uint16 .* floating point, in metres"),
        (np.zeros((4, 6, 1)), r"a\.npy holds float64 of shape \[4, 6, 1\]"),
        (np.full((4, 6), -1.0), r"a\.npy holds negative distances, down to -1 m"),
    ],
)
def test_arrays_that_are_no_metres_are_refused(sample, array, message):
    with pytest.raises(DatasetError, match=message):
        dataset().read_depth(in_metres(sample, array))


def test_an_array_of_objects_is_not_unpickled(sample):
    with pytest.raises(DatasetError, match=r"a\.npy cannot be read .*allow_pickle"):
        dataset().read_depth(in_metres(sample, np.array([[print]])))


def test_an_archive_of_arrays_is_refused(sample):
    target = sample.target.with_suffix(".npy")
    with target.open("wb") as file:
        np.savez(file, depth=np.zeros((4, 6)))

    with pytest.raises(DatasetError, match=r"a\.npy is an archive of arrays"):
        dataset().read_depth(Sample("a", sample.image, target))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (6, 4)), r"a\.png has mode L \(8 bits per pixel\); .* 16 bits \(8 bits"),
        (Image.new("RGB", (6, 4)), r"a\.png has mode RGB \(colours\)"),
    ],
)
def test_depth_of_another_format_is_refused(sample, image, message):
    image.save(sample.target)

    with pytest.raises(DatasetError, match=message):
        dataset().read_depth(sample)


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_a_truncated_depth_map_is_named(sample, suffix):
    whole = in_metres(sample, np.ones((4, 6))) if suffix == ".npy" else sample
    whole.target.write_bytes(whole.target.read_bytes()[:-40])

    with pytest.raises(DatasetError, match=rf"a\{suffix} cannot be read .*incomplete"):
        dataset().read_depth(whole)


def test_a_depth_camera_may_have_fewer_pixels_but_not_another_aspect(sample):
    write_image(sample.image, (8, 12))
    assert dataset().read_depth(sample).shape == (4, 6)

    write_image(sample.image, (12, 8))
    with pytest.raises(DatasetError, match=r"a\.png has 4x6 px and its image .* 12x8 px .*aspect"):
        dataset().read_depth(sample)


def test_a_crop_is_scored_and_nothing_beside_it():
    mask_HW = dataset(crop=EIGEN_CROP).eval_mask(480, 640)

    assert mask_HW[45:471, 41:601].all()
    assert mask_HW.sum() == (471 - 45) * (601 - 41)


def test_a_crop_of_another_size_is_refused():
    with pytest.raises(DatasetError, match="has 240x320 px, but .* is defined for 480x640 px"):
        dataset(crop=EIGEN_CROP).eval_mask(240, 320)


def test_without_a_crop_all_is_scored():
    assert dataset().eval_mask(240, 320) is None
