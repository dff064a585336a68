"""Whether the refined backbone is better, number by number, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluate.intervals import Interval, bootstrap
from trainer.evaluate.layers import OWN
from trainer.evaluate.results import MEAN, Result, Row, Score
from trainer.report.measure import OWN_PATTERNS, Measured

Outcome = Literal["better", "worse", "unclear", "unknown"]
DIFFERENCE = " minus "
SPURIOUS = "spurious tokens"
_SIGNS = {"percent": " %", "metres": " m"}
_FEW = 3
_OWN = "spurious tokens by each one's own patterns"
_SPURIOUS_TITLES = {"FP or GP": f"{SPURIOUS} (FP or GP)", f"{OWN}FP or GP": f"{_OWN} (FP or GP)"}


@dataclass(frozen=True)
class Finding:
    """One number of both backbones.

    Attributes:
        title: What it is, with the data set.
        names: Of the two backbones.
        unit: As in `Score`.
        difference: Refined minus raw, with its interval.
        source: What it is of, for people: how many images or seeds.
        leads: It counts in the headline; the others are looked through for what is worse.
    """

    title: str
    names: tuple[str, str]
    unit: str
    better: Literal["higher", "lower"]
    raw: float
    refined: float
    difference: Interval
    source: str
    leads: bool

    @property
    def outcome(self) -> Outcome:
        """`unknown` without an interval; `unclear` where the interval holds zero."""
        change = self.difference
        if change.count < 2:
            return "unknown"
        if change.low <= 0 <= change.high:
            return "unclear"
        return "better" if (change.mean > 0) == (self.better == "higher") else "worse"


def plain_rows(result: Result) -> list[Row]:
    """The rows of a result that are backbones, and not differences of two."""
    return [row for row in result.rows if DIFFERENCE not in row.subject]


def subject_rows(result: Result) -> tuple[Row, Row, Row] | None:
    """The rows of raw, of refined and of their difference; None where a result lacks one."""
    rows = plain_rows(result)
    if len(rows) < 2:
        return None
    raw, refined = rows[0], rows[1]
    wanted = f"{refined.subject}{DIFFERENCE}{raw.subject}"
    difference = next((row for row in result.rows if row.subject == wanted), None)
    return None if difference is None else (raw, refined, difference)


def find(measured: Measured, results: Sequence[Result]) -> list[Finding]:
    """All scores of both backbones; those of the page's head come with `leads`.

    A recorded measurement of spurious tokens is of more images than the page shows: where there is
    one, it stands for the shown images.
    """
    found = [one for result in results for one in _of_result(result)]
    if not any(one.title.startswith(SPURIOUS) for one in found):
        found = [*_of_images(measured), *found]
    return sorted(found, key=lambda one: not one.title.startswith(SPURIOUS))


def leading(findings: Sequence[Finding]) -> list[Finding]:
    """Those of the page's head: of every result its first one, and the spurious shares and views.

    Which they are is fixed, so that no result can choose what it is judged by.
    """
    return [one for one in findings if one.leads]


def summary(findings: Sequence[Finding]) -> list[str]:
    """The verdict in lines: the headline, what is worse among all scores, what was counted."""
    counted = leading(findings)
    if not counted:
        return []
    lines = [sentence(counted)]
    known = [one for one in findings if one.outcome != "unknown"]
    worse = [_with_interval(one, findings) for one in known if one.outcome == "worse"]
    if known:
        lines.append(f"Clearly worse: {', '.join(worse) or f'none of all {len(known)} scores'}.")
    return [*lines, f"The headline counts {_listed([one.title for one in counted])}."]


def _with_interval(one: Finding, findings: Sequence[Finding]) -> str:
    change, digits = one.difference, 2 if one.unit == "percent" else 3
    mean, low, high = (f"{v:+.{digits}f}" for v in (change.mean, change.low, change.high))
    is_shared = sum(other.title == one.title for other in findings) > 1
    of = f" ({one.source})" if is_shared else ""
    return f"{one.title}{of} {mean} [{low}, {high}]{_SIGNS.get(one.unit, '')}"


def sentence(findings: Sequence[Finding]) -> str:
    """The findings in one sentence or two; what is worse is always named."""
    parts: dict[Outcome, list[str]] = {"better": [], "worse": [], "unclear": [], "unknown": []}
    for one in findings:
        parts[one.outcome].append(one.title)
    known = len(findings) - len(parts["unknown"])
    kinds: tuple[tuple[Outcome, str], ...] = (
        ("better", "better in"),
        ("worse", "worse in"),
        ("unclear", "not clearly different in"),
    )
    texts = []
    for outcome, words in kinds:
        names = parts[outcome]
        if not names:
            continue
        if known <= _FEW:
            texts.append(f"{words} {_listed(names)}")
            continue
        count = f"{len(names)} of {known} numbers" if not texts else str(len(names))
        is_named = outcome == "worse" or len(names) <= _FEW
        texts.append(f"{words} {count} ({_listed(names)})" if is_named else f"{words} {count}")
    name = findings[0].names[1] if findings else ""
    subject = "The refined backbone" if name == "refined" else f"The backbone called {name}"
    text = f"{subject} is {'; '.join(texts)}." if texts else ""
    if parts["unknown"]:
        text += f" Measured once, so without an interval: {_listed(parts['unknown'])}."
    return text.strip()


def _of_images(measured: Measured) -> list[Finding]:
    if len(measured.subjects) < 2:
        return []
    names = measured.subjects[0], measured.subjects[-1]
    shares = measured.shares()
    num = len(measured.shown)
    fields = {"FP or GP": "fp_gp", "FP": "fixed_pattern", "GP": "global_proxy"}
    wanted = [(names[1], name, field) for name, field in fields.items()]
    if measured.has_attention:
        wanted.append((names[1], "AH", "hijacked"))
    wanted += [(OWN_PATTERNS, OWN + name, field) for name, field in fields.items()]
    found = []
    for row, name, field in wanted:
        raw = [100 * getattr(one, field) for one in shares[names[0]]]
        refined = [100 * getattr(one, field) for one in shares[row]]
        found.append(
            Finding(
                title=_SPURIOUS_TITLES.get(name, name),
                names=names,
                unit="percent",
                better="lower",
                raw=sum(raw) / num,
                refined=sum(refined) / num,
                difference=bootstrap([b - a for a, b in zip(raw, refined, strict=True)]),
                source=f"the {num} images below" if num > 1 else "the image below",
                leads=name in _SPURIOUS_TITLES,
            )
        )
    return found


def _of_result(result: Result) -> list[Finding]:
    rows = subject_rows(result)
    if rows is None:
        return []
    raw, refined, difference = rows
    found = []
    for score, before, change in zip(refined.scores, raw.scores, difference.scores, strict=True):
        what = f"{score.name} on {result.dataset}"
        if result.task == "spurious":
            what = _SPURIOUS_TITLES.get(score.name, score.name)
        elif score.name == MEAN:
            what = f"mean mIoU on {result.dataset}"
        elif any(each.name == MEAN for each in raw.scores):  # the others are called by data set
            what = f"mIoU on {score.name}"
        count = change.interval.count
        found.append(
            Finding(
                title=what,
                names=(raw.subject, refined.subject),
                unit=score.unit,
                better=score.better,
                raw=before.interval.mean,
                refined=score.interval.mean,
                difference=change.interval,
                source=_source(result, count),
                leads=_leads(result, score),
            )
        )
    return found


def _source(result: Result, count: int) -> str:
    """What a difference is over; of images with their size, which decides much of these shares."""
    of = "seed" if result.task in ("segmentation", "depth") else "image"
    text = f"{count} {of}s" if count > 1 else f"{count} {of}"
    size = result.settings.get("size")
    if result.task == "spurious" and isinstance(size, list):
        text += f" at {' x '.join(map(str, size))} px"
    return text


def _leads(result: Result, score: Score) -> bool:
    """Of most results the first score; of spurious tokens the joined share, and the views; of
    several data sets their mean."""
    names = [each.name for each in result.rows[0].scores]
    if result.task != "spurious":
        return score.name == (MEAN if MEAN in names else names[0])
    return score.name in _SPURIOUS_TITLES or score.name.startswith("view ")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
