"""What the page's head says of the numbers."""

import pytest

from tests.trainer.report.page_parts import segmentation_result
from trainer.evaluate.results import Row, new_result, score
from trainer.report.measure import Measured
from trainer.report.verdict import find, leading, sentence, summary

NOTHING = Measured((), None, (), has_attention=False)


def spurious(raw, refined):
    def row(name, shares):
        names = ("FP", "FP or GP", "own FP or GP", "norm outliers")
        scores = [score(each, shares, better="lower", unit="percent") for each in names]
        scores.append(score("view margin (shift)", [0.5, 0.6], better="higher", unit="ratio"))
        return Row(subject=name, scores=tuple(scores))

    rows = (row("raw", raw), row("refined", refined))
    return new_result(
        task="spurious", dataset="photos", protocol="", settings={}, rows=rows, seconds=1
    )


@pytest.mark.parametrize(
    ("raw", "refined", "outcome"),
    [
        ([40, 41, 42], [43, 44, 45.5], "better"),
        ([43, 44, 45.5], [40, 41, 42], "worse"),
        ([40, 41, 42], [41, 41, 41], "unclear"),
        ([40, 41, 42], [40, 41, 42], "unclear"),
        ([40], [50], "unknown"),
    ],
)
def test_an_interval_decides_and_one_value_does_not(raw, refined, outcome):
    (found,) = find(NOTHING, [segmentation_result(raw, refined)])

    assert found.outcome == outcome
    assert found.title == "mIoU on streets"
    assert found.difference.mean == pytest.approx(sum(refined) / len(raw) - sum(raw) / len(raw))


def test_fewer_spurious_tokens_are_better():
    found = {one.title: one for one in find(NOTHING, [spurious([40, 41, 42], [20, 21, 22.5])])}

    assert [title for title, one in found.items() if one.leads] == [
        "spurious tokens (FP or GP)",
        "spurious tokens by each one's own patterns (FP or GP)",
        "view margin (shift)",
    ]
    assert found["spurious tokens (FP or GP)"].outcome == "better"
    assert found["view margin (shift)"].outcome == "unclear"


def test_images_are_not_called_seeds_and_several_data_sets_have_one_number():
    def row(name, *values):
        scores = [
            score(title, [value, value + 1], better="higher", unit="percent")
            for title, value in zip(("voc21", "ade20k", "mean"), values, strict=True)
        ]
        return Row(subject=name, scores=tuple(scores))

    result = new_result(
        task="zeroshot",
        dataset="voc21, ade20k",
        protocol="",
        settings={},
        rows=(row("raw", 10, 20, 15), row("refined", 20, 20, 20)),
        seconds=1,
    )

    *others, found = find(NOTHING, [result])

    assert [(one.title, one.leads) for one in others] == [
        ("mIoU on voc21", False),
        ("mIoU on ade20k", False),
    ]
    assert leading([*others, found]) == [found]
    assert found.title == "mean mIoU on voc21, ade20k"
    assert (found.raw, found.refined, found.source) == (15.5, 20.5, "2 images")
    (probe,) = find(NOTHING, [segmentation_result([1, 2, 3], [4, 5, 6])])
    assert probe.source == "3 seeds"


def test_the_sentence_names_what_is_worse():
    results = [
        segmentation_result([40, 41, 42], [43, 44, 45.5], dataset="a"),
        segmentation_result([43, 44, 45.5], [40, 41, 42], dataset="b"),
    ]

    assert sentence(find(NOTHING, results)) == (
        "The refined backbone is better in mIoU on a; worse in mIoU on b."
    )
    results += [
        segmentation_result([1, 2], [2, 1], dataset="c"),
        segmentation_result([43, 44, 45.5], [40, 41, 42], dataset="d"),
        segmentation_result([1], [2], dataset="e"),
    ]
    assert sentence(find(NOTHING, results)) == (
        "The refined backbone is better in 1 of 4 numbers (mIoU on a); worse in 2 (mIoU on b and "
        "mIoU on d); not clearly different in 1 (mIoU on c). Measured once, so without an "
        "interval: mIoU on e."
    )


def test_what_is_clearly_worse_is_named_also_where_the_headline_does_not_count_it():
    def row(name, share, own, view):
        scores = [
            score("FP or GP", share, better="lower", unit="percent"),
            score("own FP", own, better="lower", unit="percent"),
            score("view margin (shift)", view, better="higher", unit="ratio"),
        ]
        return Row(subject=name, scores=tuple(scores))

    def result(own):
        rows = (
            row("raw", [40, 41, 42], [10, 11, 12], [0.5, 0.6, 0.7]),
            row("refined", [20, 21, 22.5], own, [0.6, 0.7, 0.81]),
        )
        return new_result(
            task="spurious",
            dataset="photos",
            protocol="",
            settings={"size": [64, 64]},
            rows=rows,
            seconds=1,
        )

    headline, worse, counted = summary(find(NOTHING, [result([20, 21, 22.3])]))

    assert "worse" not in headline
    assert worse == "Clearly worse: own FP +10.10 [+9.67, +10.53] %."
    assert counted == "The headline counts spurious tokens (FP or GP) and view margin (shift)."
    _, none, _ = summary(find(NOTHING, [result([5, 11, 20])]))
    assert none == "Clearly worse: none of all 3 scores."
    _, two, _ = summary(find(NOTHING, [result([20, 21, 22.3]), result([5, 11, 20])]))
    assert "own FP (3 images at 64 x 64 px) +10.10" in two


def test_a_result_of_one_backbone_decides_nothing():
    result = segmentation_result([1, 2], [3, 4])
    lone = result.model_copy(update={"rows": result.rows[1:2]})

    assert find(NOTHING, [lone]) == []
    assert sentence([]) == ""
    assert summary([]) == []
