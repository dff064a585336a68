import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.evaluate.datasets.trees import write_image, write_label
from trainer.evaluate.datasets import IGNORE, DatasetError, Sample, SegmentationDataset
from trainer.evaluate.datasets.labels import in_ranges


@pytest.fixture
def sample(tmp_path):
    image = write_image(tmp_path / "a.jpg")
    return Sample("a", image, write_label(tmp_path / "a.png", (0, 1, 255)))


def dataset(num_classes=2, class_of=None):
    names = tuple(f"class {number}" for number in range(num_classes))
    return SegmentationDataset("tiny", "folder", names, (), (), class_of)


def test_a_label_map_is_read_as_it_is_stored(sample):
    label_HW = dataset().read_label(sample)

    assert label_HW.dtype == torch.uint8
    assert label_HW.shape == (4, 6)
    assert label_HW.unique().tolist() == [0, 1, 255]


def test_a_palette_gives_its_indices_and_not_its_colours(sample):
    write_label(sample.target, (0, 1, 255), palette=True)

    assert dataset().read_label(sample).flatten()[:3].tolist() == [0, 1, 255]


def test_values_are_turned_into_class_numbers(sample):
    label_HW = dataset(class_of={0: IGNORE, 1: 0, 255: IGNORE}).read_label(sample)

    assert label_HW.flatten()[:3].tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 2), r"a\.png holds the value 2, which .*; 0 to 1 and 255 are allowed"),
        ((7, 254, 9), r"a\.png holds the values 7, 9, 254, which"),
        (range(2, 20), r"holds the values 2, 3, 4, 5, 6, \.\.\., which"),
    ],
)
def test_values_that_no_class_has_are_named(sample, values, message):
    write_label(sample.target, tuple(values))

    with pytest.raises(DatasetError, match=message):
        dataset().read_label(sample)


def test_a_label_map_of_another_size_is_refused(sample):
    write_image(sample.image, (8, 12))

    with pytest.raises(DatasetError, match=r"a\.png has 4x6 px and its image .*a\.jpg 8x12 px"):
        dataset().read_label(sample)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (6, 4)), r"a\.png has mode RGB \(colours\); a label map is a PNG file"),
        (Image.new("LA", (6, 4)), r"has mode LA \(grey and opacity\)"),
        (Image.new("1", (6, 4)), r"has mode 1 \(1 bit per pixel\)"),
        (Image.fromarray(np.zeros((4, 6), np.uint16)), r"has mode I;16 \(16 bits per pixel\)"),
    ],
)
def test_an_image_that_is_no_map_of_class_numbers_is_refused(sample, image, message):
    image.save(sample.target)

    with pytest.raises(DatasetError, match=message):
        dataset().read_label(sample)


def test_grey_values_that_pillow_would_spread_are_refused(sample):
    grey = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) % 4)
    grey.putpalette([level * 85 for level in range(4) for _ in range(3)])
    grey.save(sample.target, bits=2)
    data = bytearray(sample.target.read_bytes())
    assert (data[24], data[25]) == (2, 3)
    as_grey = _as_grey_of_two_bits(bytes(data))
    sample.target.write_bytes(as_grey)

    with pytest.raises(DatasetError, match="has 2 or 4 bits per grey pixel"):
        dataset(4).read_label(sample)


def _as_grey_of_two_bits(palette_png: bytes) -> bytes:
    """The same PNG without its palette, its pixels taken as grey."""
    header = palette_png[12:25] + b"\x00" + palette_png[26:29]
    crc = zlib.crc32(header).to_bytes(4, "big")
    start = palette_png.index(b"IDAT") - 4
    return palette_png[:12] + header + crc + palette_png[start:]


def test_lossy_labels_are_refused(sample):
    Image.new("L", (6, 4)).save(sample.target, format="JPEG")

    with pytest.raises(DatasetError, match=r"a\.png is a JPEG file, not PNG"):
        dataset().read_label(sample)


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_a_damaged_label_is_named(sample, kept):
    noise = np.random.default_rng(0).integers(0, 2, (4, 6), dtype=np.uint8)
    Image.fromarray(noise).save(sample.target)
    sample.target.write_bytes(sample.target.read_bytes()[:kept])

    with pytest.raises(DatasetError, match=r"a\.png cannot be read .*damaged or incomplete"):
        dataset().read_label(sample)


def test_a_damaged_image_is_named(sample):
    sample.image.write_bytes(b"nothing")

    with pytest.raises(DatasetError, match=r"a\.jpg cannot be read"):
        dataset().read_label(sample)


def test_a_label_that_went_away_is_named(sample):
    sample.target.unlink()

    with pytest.raises(DatasetError, match=r"a\.png is gone"):
        dataset().read_label(sample)


def test_ranges_of_numbers_are_named_in_words():
    assert in_ranges([3]) == "3"
    assert in_ranges([255, *range(19)]) == "0 to 18 and 255"
    assert in_ranges([1, 3, 4, 9]) == "1, 3 to 4 and 9"
