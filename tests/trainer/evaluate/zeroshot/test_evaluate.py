import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from backbone import DenseEncoder
from backbone.value_path import encode_value_path
from tests.support import tiny_backbone
from trainer.evaluate.datasets import SegmentationDataset
from trainer.evaluate.datasets.samples import Sample
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.results import CLASS_IOU
from trainer.evaluate.subjects import LocalSubject
from trainer.evaluate.windows import Windows
from trainer.evaluate.zeroshot import (
    AlignedSubject,
    ZeroshotError,
    ZeroshotSettings,
    benchmark_table,
    evaluate_zeroshot,
    make_vocabulary,
)
from trainer.evaluate.zeroshot.heads import Projection

COLOURS = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 20]])
CLASSES = ("red", "green", "blue", "yellow")
SIDE, PATCH = 64, 16


def planted_subject(name="raw"):
    """A tower that sees every patch by itself, and a projection that tells its colours apart.

    The embedding of a patch of colour k is the k-th unit vector, and so is that of the k-th name.
    """
    backbone = tiny_backbone("vit_base_patch16_clip_quickgelu_224")
    with torch.no_grad():
        backbone.vit.pos_embed.zero_()
        first = backbone.vit.blocks[0].attn.proj
        first.weight.zero_()
        first.bias.zero_()
    encoder = DenseEncoder(backbone, digest="planted", precision="fp32")
    flat = COLOURS.to(torch.uint8)[:, :, None, None].expand(-1, -1, PATCH, PATCH)
    tokens_KC = encode_value_path(encoder, flat).tokens[:, 0]
    weight = torch.linalg.pinv(tokens_KC)  # [C, K], so that tokens @ weight is the identity
    return AlignedSubject(
        LocalSubject(encoder, name=name), Projection(weight.T.contiguous(), None), "attention"
    )


def write_dataset(
    folder, *, num_images=3, noise=False, background=None, label_scale=1, columns=None
):
    """Images of stripes a patch wide; labels are their colours, or noise.

    Stripes, because the bilinear boundary of patches rounds the corners of anything else.
    """
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number in range(num_images):
        drawn = torch.randint(0, len(COLOURS), (SIDE // PATCH,), generator=generator)
        cells = (drawn if columns is None else torch.tensor(columns)).expand(SIDE // PATCH, -1)
        classes = cells.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        pixels = COLOURS[classes].to(torch.uint8).numpy()
        image, target = folder / f"{number}.png", folder / f"{number}_label.png"
        scale = label_scale
        pixels = pixels.repeat(scale, 0).repeat(scale, 1)
        labels = classes.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        if noise:
            labels = torch.randint(0, len(COLOURS), labels.shape, generator=generator)
        Image.fromarray(pixels).save(image)
        Image.fromarray(labels.to(torch.uint8).numpy()).save(target)
        samples.append(Sample(str(number), image, target))
    return SegmentationDataset(
        "planted", "folder", CLASSES, (), tuple(samples), background=background
    )


def settings(**changes):
    given = {"size": (SIDE, SIDE), "windows": None, "path": "attention", "family": "clip"}
    given["notes"] = {"text": "t"}
    return ZeroshotSettings(**(given | changes))


def measured(dataset, *, subjects=None, **changes):
    return evaluate_zeroshot(
        dataset,
        make_vocabulary(dataset),
        torch.eye(len(COLOURS)),
        subjects or [planted_subject()],
        settings=settings(**changes),
    )


def value(result, row=0, score=0):
    return result.rows[row].scores[score].interval.mean


@pytest.mark.parametrize("label_scale", [1, 3])
def test_planted_colours_are_segmented_without_a_mistake(tmp_path, label_scale):
    side = SIDE * label_scale  # a stripe is one patch wide, or three
    result = measured(write_dataset(tmp_path, label_scale=label_scale), size=(side, side))

    assert [value(result, score=n) for n in range(3)] == [100, 100, 100]
    assert result.rows[0].details[CLASS_IOU] == dict.fromkeys(CLASSES, 100.0)
    assert result.task == "zeroshot"
    assert "without its residual" in result.protocol
    assert result.settings["text"] == "t"


def test_labels_of_noise_give_chance(tmp_path):
    result = measured(write_dataset(tmp_path, num_images=8, noise=True))

    # Of K classes as likely: the pixel accuracy is 1 / K, the IoU 1 / (2 K - 1).
    assert value(result, score=2) == pytest.approx(25, abs=1)
    assert value(result) == pytest.approx(100 / 7, abs=1)


def test_one_window_is_no_window_and_small_ones_cover_the_image(tmp_path):
    dataset = write_dataset(tmp_path, noise=True)
    whole = measured(dataset)

    assert measured(dataset, windows=Windows(SIDE, PATCH)).rows == whole.rows
    # Patches do not see each other here: windows change nothing either.
    assert measured(dataset, windows=Windows(32, 16)).rows == whole.rows


def test_raw_and_refined_stand_side_by_side_with_their_difference(tmp_path):
    worse = planted_subject("worse")
    weight = worse._head.weight
    weight[[0, 1]] = weight[[1, 0]]  # red is taken for green
    dataset = write_dataset(tmp_path, num_images=6)

    result = measured(dataset, subjects=[worse, planted_subject("refined")])

    assert [row.subject for row in result.rows] == ["worse", "refined", "refined minus worse"]
    assert value(result, 2) == pytest.approx(100 - value(result, 0))
    interval = result.rows[2].scores[0].interval
    assert interval.low <= interval.mean <= interval.high
    assert interval.count == 6
    assert result.rows[0].details[CLASS_IOU]["red"] == 0


def test_embeddings_of_patches_are_found_again(tmp_path):
    dataset = write_dataset(tmp_path)
    store = FeatureStore(tmp_path / "features")
    subject = planted_subject()

    def run(each):
        return evaluate_zeroshot(
            dataset,
            make_vocabulary(dataset),
            torch.eye(4),
            [each],
            settings=settings(),
            store=store,
        )

    first = run(subject)
    subject.encode = None  # would fail if it were asked again
    assert run(subject).rows == first.rows
    assert value(first) == 100


def test_the_background_has_what_nothing_fits(tmp_path):
    # Names of three colours; the fourth, class 0, fits none of them.
    dataset = write_dataset(tmp_path, background=0, columns=[1, 0, 2, 0])
    names = make_vocabulary(dataset, rule="threshold")
    assert names.classes == (1, 2, 3)
    embeddings = torch.eye(4)[1:]

    def miou(threshold):
        given = settings(threshold=threshold, scale=2.0)
        return value(
            evaluate_zeroshot(dataset, names, embeddings, [planted_subject()], settings=given)
        )

    assert miou(None) < 50  # class 0 is never found
    # Half way to a patch that nothing fits the cosines are 1/2, 0, 0: e / (e + 2) = 0.576.
    assert miou(0.576) == 100

    with pytest.raises(ZeroshotError, match="no background class"):
        measured(write_dataset(tmp_path), threshold=0.5)


def test_key_of_features_says_what_they_are_of():
    subject = planted_subject()
    other = AlignedSubject(
        LocalSubject(subject._encoder), Projection(2 * subject._head.weight, None), "attention"
    )
    block = AlignedSubject(LocalSubject(subject._encoder), subject._head, "block")

    assert len({subject.key, other.key, block.key}) == 3
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert subject.encode(images).shape == (1, 6, 4)
    torch.testing.assert_close(subject.encode(images), F.normalize(other.encode(images), dim=-1))


def test_the_table_of_benchmarks_has_their_mean(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = measured(write_dataset(tmp_path / "a"))
    second = measured(write_dataset(tmp_path / "b", noise=True)).model_copy(
        update={"dataset": "noise"}
    )

    table = benchmark_table([first, second])

    row = table.rows[0]
    assert [score.name for score in row.scores] == ["planted", "noise", "mean"]
    assert row.scores[2].interval.mean == pytest.approx((value(first) + value(second)) / 2)
    assert row.scores[2].interval.count == 6
    assert [each.subject for each in table.rows] == ["raw"]
    assert table.dataset == "planted, noise"
    assert row.details["noise"][CLASS_IOU] == second.rows[0].details[CLASS_IOU]
    assert json.loads(table.model_dump_json())["rows"][0]["details"]["planted"]["mIoU"] == 100
