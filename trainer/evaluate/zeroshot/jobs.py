"""What is to be measured: data sets with the names, sizes and thresholds that were asked for.

Many choices may be given for all data sets or for one, as LAYOUT=VALUE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from trainer.evaluate.datasets import SEGMENTATION_LAYOUTS, SegmentationDataset, open_segmentation
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.vocabulary import (
    BackgroundRule,
    Vocabulary,
    make_vocabulary,
    read_lines,
)

# As in SCLIP (arXiv:2312.01597): the short sides that images are resized to, and the probability
# under which a pixel is background where the background has no names.
SHORT_SIDE = 336
SHORT_SIDES = {"cityscapes": 560}
THRESHOLD = 0.1

_Found = TypeVar("_Found")


class Job(NamedTuple):
    """What is done for one data set."""

    dataset: SegmentationDataset
    vocabulary: Vocabulary
    threshold: float | None
    asked_side: int | None

    def short_side(self, native_size: tuple[int, int]) -> int:
        """Of images in pixels: what was asked for, or the usual one, but no less than native."""
        usual = SHORT_SIDES.get(self.dataset.layout, SHORT_SIDE)
        return self.asked_side or max(usual, min(native_size))


def plan_jobs(
    data: Sequence[str],
    layout: str = "auto",
    *,
    class_names: Sequence[str] = (),
    short_sides: Sequence[str] = (),
    rule: BackgroundRule | None = None,
    background_names: str | None = None,
    threshold: float | None = None,
) -> list[Job]:
    """Open every data set, and choose its names, before anything slow.

    Args:
        data: Folders, or LAYOUT=FOLDER.
        layout: Of folders that name none.
        class_names: Files with a line of names per class, or LAYOUT=FILE.
        short_sides: Pixels, or LAYOUT=PIXELS.
        rule: For the background of data sets that have one.
        background_names: File with a name per line.
        threshold: For data sets that have a background.

    Raises:
        EvaluationError: a data set or file cannot be read, or a choice fits nothing.
    """
    lines_of = _by_layout("--class-names", class_names, Path)
    sides = _by_layout("--short-side", short_sides, _side)
    things = read_lines(Path(background_names)) if background_names else None
    if threshold is not None and not 0 < threshold < 1:
        raise ZeroshotError(f"--threshold {threshold:g} is no probability between 0 and 1")
    jobs = []
    for given in data:
        named, folder = _split_layout(given)
        dataset = open_segmentation(Path(folder), named or layout)
        file = lines_of.get(dataset.layout) or lines_of.get("")
        has_background = dataset.background is not None
        vocabulary = make_vocabulary(
            dataset,
            lines=read_lines(file) if file else None,
            rule=rule if has_background else None,
            background_names=things if has_background else None,
        )
        limit = threshold if has_background else None
        if limit is None and vocabulary.rule == "threshold":
            limit = THRESHOLD
        jobs.append(Job(dataset, vocabulary, limit, sides.get(dataset.layout) or sides.get("")))
    titles = [job.dataset.name for job in jobs]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise ZeroshotError(
            f"--data has {twice} twice, and a table needs a name for each; one is enough"
        )
    if threshold is not None and all(job.threshold is None for job in jobs):
        raise ZeroshotError(
            "--threshold decides what is background, and no data set has such a class; leave it out"
        )
    return jobs


def _by_layout(
    flag: str, given: Sequence[str], convert: Callable[[str], _Found]
) -> dict[str, _Found]:
    """Values of `[LAYOUT=]VALUE`, that of no layout under the empty name."""
    found: dict[str, _Found] = {}
    for each in given:
        layout, value = _split_layout(each)
        if (layout or "") in found:
            raise ZeroshotError(f"{flag} was given twice for {layout or 'every layout'}")
        found[layout or ""] = convert(value)
    return found


def _split_layout(given: str) -> tuple[str | None, str]:
    before, equals, after = given.partition("=")
    if equals and before in (*SEGMENTATION_LAYOUTS, "auto"):
        return before, after
    return None, given


def _side(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ZeroshotError(f"--short-side {text} is not a number of pixels")
    return int(text)
