import json

import pytest

from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.results import (
    CLASS_IOU,
    Row,
    class_table,
    markdown,
    new_result,
    read,
    score,
    table,
    write,
)


def row(subject, miou, rmse=(0.5,), **details):
    scores = (
        score("mIoU", miou, better="higher", unit="percent"),
        score("RMSE", rmse, better="lower", unit="metres"),
    )
    return Row(
        subject=subject, spec=f"m/{subject}", digest="ab" * 32, scores=scores, details=details
    )


def result(*rows, task="segmentation"):
    return new_result(
        task=task,
        dataset="camvid",
        protocol="Linear probe.",
        settings={
            "size": [352, 480],
            "windows": None,
            "learning_rates": [0.1, 1e-3],
            "seeds": [0, 1],
        },
        rows=rows,
        seconds=3.0,
    )


def test_refined_minus_raw_is_taken_seed_by_seed():
    found = result(row("raw", (20, 21, 22)), row("refined", (24, 25, 26)))

    assert [each.subject for each in found.rows] == ["raw", "refined", "refined minus raw"]
    difference = found.rows[2].scores[0]
    assert difference.values == (4, 4, 4)
    # Every seed gains four: the difference is certain, though seeds differ.
    assert (difference.interval.low, difference.interval.high) == (4, 4)


def test_the_table_has_intervals_and_a_line_for_each_subject():
    lines = table(result(row("raw", (20, 21)), row("refined", (24.5, 24.5)))).splitlines()

    assert lines[0].split("|")[2].strip() == "mIoU (%)"
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["raw", "20.50 ± 6.35", "0.5000"]
    assert "+4.00 ± 6.35" in lines[4]
    assert len({len(line) for line in lines}) == 1


def test_a_single_seed_has_no_interval():
    text = markdown(result(row("raw", (20,)), row("refined", (24,))))

    assert "20.00 |" in text
    assert "±" not in text
    assert "confidence" not in text


def test_markdown_says_what_is_better_and_how_it_was_measured():
    text = markdown(result(row("raw", (20, 21)), row("refined", (24, 25))))

    assert "Higher is better: mIoU; lower is better: RMSE; intervals are 95 %" in text
    assert "over 1 or 2 seeds" in text
    assert "Linear probe. Settings: size 352x480, learning rates 0.1 0.001, seeds 0 1." in text
    assert "- raw: `m/raw`, weights abababababab" in text
    assert "- refined minus raw" not in text


def test_classes_stand_side_by_side():
    raw = row("raw", (20,), **{CLASS_IOU: {"Sky": 90.04, "Car": None}})
    refined = row("refined", (24,), **{CLASS_IOU: {"Sky": 91.0, "Car": None}})

    lines = class_table(result(raw, refined)).splitlines()

    assert lines[0] == "| IoU (%) |    raw | refined |"
    assert lines[2:] == ["| Sky     |   90.0 |    91.0 |", "| Car     | absent |  absent |"]
    assert class_table(result(row("raw", (20,)))) == ""


def test_a_result_that_was_written_is_read_again(tmp_path):
    found = result(row("raw", (20, 21)), row("refined", (24, 25), best={"0": 0.1}))

    write(found, tmp_path / "new" / "a.json", tmp_path / "a.md")

    assert read(tmp_path / "new" / "a.json") == found
    assert (tmp_path / "a.md").read_text() == markdown(found)
    document = json.loads((tmp_path / "new" / "a.json").read_text())
    assert document["rows"][0]["scores"][0]["interval"]["count"] == 2
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "the file: Invalid JSON"), ('{"task": "depth"}', "dataset")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(EvaluationError, match=message):
        read(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(EvaluationError, match=r"file/a\.json cannot be written"):
        write(result(row("raw", (20,))), tmp_path / "file" / "a.json")


def test_rows_whose_values_are_not_paired_get_no_difference():
    unpaired = [row("raw", (20, 21)), row("refined", (24, 25))]
    scores = tuple(each.model_copy(update={"values": ()}) for each in unpaired[0].scores)
    unpaired[0] = unpaired[0].model_copy(update={"scores": scores})

    assert len(result(*unpaired).rows) == 2
