from dataclasses import dataclass

import pytest

from trainer.evaluate.errors import StoreError
from trainer.evaluate.finished import FinishedProbes, content_digest


@dataclass(frozen=True)
class Numbers:
    score: float
    by_rate: dict[float, float]
    class_iou: tuple[float | None, ...]


NUMBERS = Numbers(0.1 + 0.2, {1e-3: 0.5}, (None, 1.0))


def refuse():
    raise AssertionError("measured again")


def test_a_probe_is_measured_once_and_comes_back_as_it_was(tmp_path):
    finished = FinishedProbes(tmp_path / "probes")

    assert finished.once({"seed": 0}, Numbers, lambda: NUMBERS) == NUMBERS
    assert finished.once({"seed": 0}, Numbers, refuse) == NUMBERS


def test_other_settings_are_another_probe(tmp_path):
    finished = FinishedProbes(tmp_path)
    finished.once({"seed": 0}, Numbers, lambda: NUMBERS)

    with pytest.raises(AssertionError, match="measured again"):
        finished.once({"seed": 1}, Numbers, refuse)


def test_a_damaged_file_is_measured_again_and_said(tmp_path, caplog):
    finished = FinishedProbes(tmp_path)
    finished.once({}, Numbers, lambda: NUMBERS)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:20])

    assert finished.once({}, Numbers, lambda: NUMBERS) == NUMBERS
    assert "is damaged" in caplog.text
    assert finished.once({}, Numbers, refuse) == NUMBERS


def test_without_a_folder_nothing_is_kept():
    finished = FinishedProbes(None)
    finished.once({}, Numbers, lambda: NUMBERS)

    with pytest.raises(AssertionError, match="measured again"):
        finished.once({}, Numbers, refuse)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match=r"cannot be written to .*file/probes"):
        FinishedProbes(tmp_path / "file" / "probes").once({}, Numbers, lambda: NUMBERS)


def test_the_digest_is_of_contents_and_a_missing_file_is_named(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("a")
    two.write_text("b")

    assert content_digest([one, two]) == content_digest([one, two])
    assert content_digest([one, two]) != content_digest([two, one])
    with pytest.raises(StoreError, match="nothing cannot be read"):
        content_digest([tmp_path / "nothing"])
