"""Spurious tokens, norms and view consistency as one result."""

import pytest
import torch

from backbone import open_model
from tests.support import tiny_artifact, tiny_backbone
from tests.trainer.evaluate.planting import PlantedSubject, pictures
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.layers import BY_LAYER, layer_table, score_table
from trainer.evaluate.pictures import Pictures
from trainer.evaluate.results import Result
from trainer.evaluate.subjects import LocalSubject
from trainer.evaluate.unlabelled import SpuriousSettings, evaluate_spurious


def evaluate(subjects, shown=None, **settings):
    return evaluate_spurious(
        subjects, shown or pictures(count=8), SpuriousSettings(**settings), dataset="planted"
    )


def means(result, row):
    return {score.name: score.interval.mean for score in result.rows[row].scores}


def test_raw_refined_and_their_difference_have_the_planted_scores():
    result = evaluate([PlantedSubject(), PlantedSubject("refined", spurious=False)])

    assert [row.subject for row in result.rows] == ["raw", "refined", "refined minus raw"]
    raw, refined, difference = (means(result, row) for row in range(3))
    assert raw["FP"] == pytest.approx(100 * 6 / 64)
    assert raw["FP or GP"] == raw["own FP or GP"] == pytest.approx(100 * 16 / 64)
    assert refined["FP or GP"] == refined["own FP or GP"] == 0
    assert difference["FP or GP"] == pytest.approx(-100 * 16 / 64)
    assert refined["view margin (shift)"] == pytest.approx(1)
    assert refined["view retrieval (shift)"] == 100
    # What nobody asked for, and what a subject of another process cannot tell, is not there.
    assert not {"AH", "clean", "norm outliers"} & set(raw)
    assert Result.model_validate_json(result.model_dump_json()).rows == result.rows


def test_intervals_are_over_images_and_the_difference_is_paired():
    few, many = pictures(count=2, num_proxy=4), pictures(count=2, num_proxy=20)
    mixed = Pictures(*(torch.cat(pair) for pair in zip(few[:2], many[:2], strict=True)), few[2])

    result = evaluate([PlantedSubject(), PlantedSubject("refined")], mixed)

    raw, _, difference = (row.scores[2] for row in result.rows)
    assert raw.values == pytest.approx([100 * n / 64 for n in (10, 10, 26, 26)])
    assert raw.interval.low < raw.interval.mean < raw.interval.high
    assert raw.interval.count == 4
    # However images differ, the two subjects do not.
    assert (difference.interval.low, difference.interval.high) == (0, 0)


def test_one_subject_alone_has_its_own_patterns_only():
    result = evaluate([PlantedSubject()])

    assert [row.subject for row in result.rows] == ["raw"]
    assert not any(score.name.startswith("own") for score in result.rows[0].scores)
    assert "by its own patterns" in result.protocol


def test_the_table_has_scores_in_lines_and_subjects_in_columns():
    result = evaluate([PlantedSubject(), PlantedSubject("refined", spurious=False)])

    head, rule, *lines = score_table(result).splitlines()

    assert [cell.strip() for cell in head.split("|")][2:5] == [
        "raw",
        "refined",
        "refined minus raw",
    ]
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    assert "| FP or GP (%)" in lines[2]
    assert "25.0 [25.0, 25.0]" in lines[2]
    assert layer_table(result) == ""


@pytest.fixture
def local(tmp_path):
    """A raw and a refined subject of two blocks, and pictures for them."""
    raw, refined = (
        LocalSubject(
            open_model(tiny_artifact(tmp_path / name, seed), precision="fp32"), name=name, spec=name
        )
        for seed, name in enumerate(("raw", "refined"))
    )
    generator = torch.Generator().manual_seed(0)
    sides = ((2, 3, 64, 64), (2, 3, 80, 80), (3, 64, 64))
    return [raw, refined], Pictures(
        *(torch.randint(256, side, dtype=torch.uint8, generator=generator) for side in sides)
    )


def test_blocks_attention_and_norms_of_subjects_of_this_process(local):
    subjects, shown = local

    result = evaluate(subjects, shown, by_layer=True, attention_layers=(0, 1), sigma=0.5)

    raw = means(result, 0)
    assert raw["AH"] > 0
    assert raw["norm max/median"] > 1
    assert 0 <= raw["clean"] <= 100 - max(raw["AH"], raw["FP or GP"])
    blocks = result.rows[0].details[BY_LAYER]
    assert [block["layer"] for block in blocks] == [0, 1]
    assert blocks[-1]["FP"] == pytest.approx(raw["FP"], abs=1e-3)
    assert blocks[-1]["norm max/median"] == pytest.approx(raw["norm max/median"], abs=1e-3)
    table = layer_table(result)
    assert len(table.splitlines()) == 4
    assert "refined own GP" in table
    assert "raw own GP" not in table


def test_masked_channels_reach_cosines_and_views(local):
    subjects, shown = local

    plain, masked = (
        evaluate_spurious(subjects[:1], shown, SpuriousSettings(), dataset="", channels=channels)
        for channels in ((), range(20))
    )

    assert means(plain, 0)["view margin (zoom)"] != means(masked, 0)["view margin (zoom)"]
    assert masked.settings["masked channels"] == list(range(20))


def test_subjects_that_cannot_be_compared_are_refused(local, tmp_path):
    subjects, shown = local
    coarse = PlantedSubject()
    coarse.patch_size = 8
    deep = tiny_artifact_of(tmp_path / "deep", depth=3)
    wide = tiny_artifact_of(tmp_path / "wide", embed_dim=64)

    with pytest.raises(EvaluationError, match="patches of 4 px and planted raw of 8 px"):
        evaluate([coarse, PlantedSubject("refined")])
    with pytest.raises(EvaluationError, match="64 channels and raw of 32"):
        evaluate([subjects[0], wide], shown)
    with pytest.raises(EvaluationError, match="2 and 3 blocks"):
        evaluate([subjects[0], deep], shown, by_layer=True)
    with pytest.raises(EvaluationError, match="layer 2 does not exist: .* has blocks 0 to 1"):
        evaluate(subjects, shown, attention_layers=(1, 2))
    with pytest.raises(EvaluationError, match="leave --by-layer"):
        evaluate([PlantedSubject()], by_layer=True)


def tiny_artifact_of(folder, **changes):
    from backbone import RegisterBorder, save_artifact

    save_artifact(folder, tiny_backbone(**changes), border=RegisterBorder(), model_card="")
    return LocalSubject(open_model(folder, precision="fp32"), name=folder.name, spec=folder.name)


@pytest.mark.parametrize("side", [4, 30])
def test_sizes_without_a_grid_are_refused(side):
    shown = pictures(count=1)

    with pytest.raises(EvaluationError, match=f"size {side} px is not a whole number"):
        evaluate([PlantedSubject()], shown._replace(images_BSS=shown.images_BSS[..., :side]))
