import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.evaluate.probe import ProbeSettings
from trainer.evaluate.segmentation import (
    DatasetError,
    SegmentationDataset,
    evaluate_segmentation,
    read_label,
)

PATCH = 8


@pytest.fixture
def folder(tmp_path):
    """Images of two colours, 48x32 px, labelled by colour; train 6, val 2."""
    generator = np.random.default_rng(0)
    (tmp_path / "classes.json").write_text(json.dumps({"0": "dark", "1": "bright"}))
    for part, count in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / part / kind).mkdir(parents=True)
        for index in range(count):
            cells = generator.integers(0, 2, (4, 6), dtype=np.uint8)
            label = cells.repeat(PATCH, axis=0).repeat(PATCH, axis=1)
            image = np.repeat(label[..., None] * 200, 3, axis=2)
            Image.fromarray(image).save(tmp_path / part / "images" / f"{index}.png")
            Image.fromarray(label).save(tmp_path / part / "labels" / f"{index}.png")
    return tmp_path


def mean_colours(images):
    """An `encode` whose tokens are the mean colours of 8 px patches."""
    pooled = torch.nn.functional.avg_pool2d(images.float() / 255, PATCH)
    return pooled.flatten(2).transpose(1, 2)


def test_an_encoder_that_sees_the_classes_scores_high(folder):
    dataset = SegmentationDataset.open(folder)

    (result,) = evaluate_segmentation(
        dataset,
        mean_colours,
        size=(32, 48),
        settings=[ProbeSettings(learning_rates=(3e-2,), num_steps=60, batch_size=4)],
    )

    assert result.classes == ("dark", "bright")
    assert result.probe.scores.miou > 0.85


def test_tokens_that_fill_no_grid_are_refused(folder):
    dataset = SegmentationDataset.open(folder)

    with pytest.raises(DatasetError, match="23 tokens are no grid of square patches of 32x48"):
        evaluate_segmentation(dataset, lambda images: mean_colours(images)[:, 1:], size=(32, 48))


def test_a_missing_label_is_named(folder):
    (folder / "val" / "labels" / "1.png").unlink()

    with pytest.raises(DatasetError, match=r"1 of 2 images .* missing one is .*val/labels/1\.png"):
        SegmentationDataset.open(folder)


def test_a_missing_part_is_named(folder):
    for image in (folder / "val" / "images").iterdir():
        image.unlink()

    with pytest.raises(DatasetError, match="no images in .*val/images"):
        SegmentationDataset.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "classes.json is missing"),
        ("{", "is not JSON"),
        ("[]", "must number its classes"),
        ('{"0": "a", "2": "b"}', "must number its classes"),
    ],
)
def test_unusable_class_names_are_refused(folder, content, message):
    (folder / "classes.json").unlink()
    if content is not None:
        (folder / "classes.json").write_text(content)

    with pytest.raises(DatasetError, match=message):
        SegmentationDataset.open(folder)


def test_a_colour_image_is_no_label_map(folder):
    with pytest.raises(DatasetError, match="has mode RGB"):
        read_label(folder / "val" / "images" / "0.png")
