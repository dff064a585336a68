"""Charts and tables of the page."""

import re

from tests.trainer.report.page_parts import Page
from trainer.ablate.table import Cell, Table, TableRow
from trainer.evaluate.intervals import Interval
from trainer.report.ablation import ablation
from trainer.report.charts import Dot, Line, intervals, lines
from trainer.report.curves import curves


def places(svg, tag, *names):
    return [
        tuple(float(re.search(rf'{name}="([-\d.]+)"', found)[1]) for name in names)
        for found in re.findall(rf"<{tag} [^>]*>", svg)
    ]


def test_a_larger_mean_lies_further_right_and_one_value_has_no_whisker():
    svg = intervals(
        [Dot("raw", "raw", 40, 39, 41), Dot("refined", "refined", 44, 44, 44)],
        label="mIoU",
        unit="%",
    )

    ((first,), (second,)) = places(svg, "circle", "cx")
    assert first < second
    assert svg.count('class="whisker raw"') == 3
    assert "whisker refined" not in svg
    assert "mIoU %: raw 40 (39 to 41), refined 44" in svg


def test_lines_survive_equal_missing_and_single_values():
    for values in ([1.0], [2.0, 2.0, 2.0], [1.0, float("nan"), 3.0], [0.0, 0.0]):
        svg = lines([Line("<b>", range(len(values)), values)], label="loss")
        assert "nan" not in re.sub('aria-label="[^"]*"', "", svg)
        page = Page(svg)
        assert page.open == []
        assert "b" not in page.tags


def test_curves_show_what_a_run_recorded():
    records = [{"step": n, "loss": 5 - n / 100, "clean": 0.25, "lr": 0.1} for n in range(100)]

    page = Page(curves(records))

    assert page.tags.count("figure") == 3  # no terms of the loss were recorded
    assert "25" in page.text
    assert "absorption" not in page.text
    assert curves([]) == ""


def cell(name, mean, difference=None, *, measure="segmentation streets"):
    interval = Interval(mean, 1.0, mean - 2, mean + 2, 3)
    change = None if difference is None else Interval(difference, 0.5, difference - 1, 3.5, 3)
    return Cell(
        measure=measure, score=name, unit="percent", better="higher", interval=interval,
        spread="training seeds", values={0: (mean,)}, difference=change,
    )  # fmt: skip


def test_a_sweep_s_table_has_its_main_scores_and_what_was_not_measured():
    rows = (
        TableRow(
            name="full", about="all", status="done", cells=(cell("mIoU", 40), cell("mAcc", 50)),
        ),
        TableRow(
            name="<i>no-uni", about="without", changes="a.b=<u>", status="failed",
            reasons=("it <s>stopped",), minutes=4.25, cells=(cell("mIoU", 37.5, -2.5),),
        ),
        TableRow(name="no-ah", about="", status="skipped"),
    )  # fmt: skip
    sweep = Table(
        recipe="tiny", training_seeds=(0, 1, 2), probe_seeds=3, command="a && b", versions={},
        dates=("2026-01-01",), rows=rows,
    )  # fmt: skip

    page = Page(ablation(sweep))

    assert page.open == []
    assert not {"i", "u", "s"} & set(page.tags)
    assert "mAcc" not in page.text
    assert "37.50 35.50 to 39.50 −2.50 vs full −3.50 to +3.50" in page.text
    assert "failed it <s>stopped" in page.text
    assert "no-ah – – skipped" in page.text
