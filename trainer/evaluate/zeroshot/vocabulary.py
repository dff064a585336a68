"""What a data set's classes are called in a sentence, and what stands for the background.

A class may have several names, "person, man, woman": a pixel is of the class whose best name fits
it best, as in SCLIP's class files (arXiv:2312.01597). Classes are read from the data set, or from a
file with one line per class in the order of their numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.evaluate.datasets import SegmentationDataset
from trainer.evaluate.zeroshot.errors import ZeroshotError

BackgroundRule = Literal["names", "threshold", "none"]

# Things around objects. Chosen after SCLIP's class files for VOC21 and COCO-Object, which name such
# things in the place of "background"; those that a data set has as a class are left out.
BACKGROUND_NAMES = (
    *("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "desk"),
    *("bed", "building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf"),
    *("curtain", "stair", "floor", "hill", "rail", "fence"),
)
# Names that run together or are short in the label files.
_SPELLED = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    "bedclothes": "bed clothes",
    "tv": "television",
}


@dataclass(frozen=True)
class Vocabulary:
    """Every name that pixels are compared with, and the class that each belongs to.

    Attributes:
        names: In the order of their classes; no name stands twice for one class.
        classes: Class number of each name.
        num_classes: Of the data set, the background included.
        background: Its class number; None where the data set has none.
        rule: How pixels come to be background: by `names` of their own, by a `threshold` on the
            best probability (no name is of the background then), or never.
    """

    names: tuple[str, ...]
    classes: tuple[int, ...]
    num_classes: int
    background: int | None
    rule: BackgroundRule


def default_rule(dataset: SegmentationDataset) -> BackgroundRule:
    """Names where the background is what is left beside objects, as in VOC21 and COCO-Object.

    Context60 names walls, grass and sky itself: its background is known by a low probability alone.
    """
    if dataset.background is None:
        return "none"
    foreground = {readable(name) for name in dataset.classes}
    return "names" if foreground.isdisjoint({"sky", "wall", "grass"}) else "threshold"


def readable(name: str) -> str:
    """A class name as it stands in a sentence: "diningtable" is "dining table".

    COCO-Stuff's "wall-other" is a wall like others, and its "wall-brick" a "wall brick".
    """
    plain = name.strip().lower().removesuffix("-other").replace("-", " ").replace("_", " ")
    return _SPELLED.get(plain, plain)


def make_vocabulary(
    dataset: SegmentationDataset,
    *,
    lines: Sequence[str] | None = None,
    rule: BackgroundRule | None = None,
    background_names: Sequence[str] | None = None,
) -> Vocabulary:
    """The names of a data set's classes.

    Args:
        dataset: What is to be segmented.
        lines: Names of each class, separated by commas; default the data set's own, made readable.
        rule: For the background; None is `default_rule`. Ignored where there is no background.
        background_names: With the rule `names`; default `BACKGROUND_NAMES`, or the background's
            own line where `lines` were given.

    Raises:
        ZeroshotError: another number of lines than classes, a line without a name, or a rule that
            needs a background.
    """
    background = dataset.background
    if rule is None:
        rule = default_rule(dataset)
    if background is None and rule != "none":
        raise ZeroshotError(
            f"{dataset.name} ({dataset.layout}) has no background class, so the background rule "
            f"{rule!r} has nothing to decide; leave it out"
        )
    given = [readable(name) for name in dataset.classes] if lines is None else list(lines)
    if len(given) != len(dataset.classes):
        raise ZeroshotError(
            f"{len(given)} lines of class names for the {len(dataset.classes)} classes of "
            f"{dataset.name} ({dataset.layout}); write one line per class, the first for "
            f"{dataset.classes[0]!r}, several names separated by commas"
        )
    by_class = {number: _split(line, number) for number, line in enumerate(given)}
    if background is not None:
        foreground = {
            name for number, found in by_class.items() if number != background for name in found
        }
        if rule != "names":
            del by_class[background]
        elif background_names is not None or lines is None:
            wanted = BACKGROUND_NAMES if background_names is None else background_names
            kept = [name for name in wanted if name not in foreground]
            if not kept:
                raise ZeroshotError(
                    "every background name is the name of a class; give others, or choose the "
                    "background rule threshold"
                )
            by_class[background] = kept
    return _joined(by_class, len(dataset.classes), background, rule)


def read_lines(path: Path) -> tuple[str, ...]:
    """Lines of a text file, empty ones at its end left out.

    Raises:
        ZeroshotError: it cannot be read.
    """
    try:
        return tuple(path.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ZeroshotError(
            f"class names {path} cannot be read ({error}); give a text file with a line per class"
        ) from error


def _split(line: str, number: int) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in line.split(",") if name.strip()))
    if not names:
        raise ZeroshotError(f"class {number} has no name: its line is empty")
    return names


def _joined(
    by_class: Mapping[int, Sequence[str]],
    num_classes: int,
    background: int | None,
    rule: BackgroundRule,
) -> Vocabulary:
    pairs = [(name, number) for number, names in sorted(by_class.items()) for name in names]
    return Vocabulary(
        names=tuple(name for name, _ in pairs),
        classes=tuple(number for _, number in pairs),
        num_classes=num_classes,
        background=background,
        rule=rule,
    )
