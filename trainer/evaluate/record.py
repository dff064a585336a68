"""Results in the artifact that they are of: `refinery.json` and the section "Measured" of its card.

    record(Path("runs/siglip/refined"), result)

A result takes the place of an earlier one of the same task, data set and size, also if that was
measured with other settings; a log line says what went and what differs. The card's section
is written from what the manifest has then, between two comments; what stands outside of them is
left as it is. Weights are not touched, and neither is their digest.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from backbone.artifact import MANIFEST_FILE, read_manifest
from trainer.adapter_file import CARD_FILE, DESCRIPTION_FILE
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.files import replace_file
from trainer.evaluate.layers import BY_LAYER, layer_table, score_table
from trainer.evaluate.results import Result, markdown, table

logger = logging.getLogger(__name__)

START = "<!-- measured: written by python -m trainer.evaluate --record -->"
END = "<!-- end of what was measured -->"
_HEADING = "## Measured"
_BEFORE = "## Use"
_MOST_VALUES = 16
"""A score of more values, one per image, keeps its interval alone."""


def record(artifact_folder: Path, result: Result) -> None:
    """Add a result to an artifact, or put it in the place of an older one.

    Each file is replaced at once: a reader sees it before or after, and an interruption leaves a
    whole artifact. Several processes may record at a time.

    Raises:
        ArtifactError: the folder is no artifact.
        EvaluationError: the result is of other weights, or the folder cannot be written.
    """
    folder = Path(artifact_folder)
    digest = read_manifest(folder).digest
    if digest not in {row.digest for row in result.rows}:
        raise EvaluationError(
            f"the result is not of {folder}, whose weights have digest {digest[:12]}: it has "
            + ", ".join(f"{row.subject} {row.digest[:12]}" for row in result.rows if row.digest)
        )
    entry = _compact(result).model_dump(mode="json")
    try:
        json.dumps(entry, allow_nan=False)
    except ValueError as error:
        raise EvaluationError(
            "a score is not a finite number, which a manifest cannot hold; see whether the model's "
            "weights or its precision are at fault, or leave --record out"
        ) from error
    try:
        with _alone(folder):
            replaced = _record(folder, entry)
    except OSError as error:
        raise EvaluationError(
            f"{folder} cannot be written ({error.strerror}); make it writable, or leave --record "
            "out"
        ) from error
    except ValueError as error:  # a file beside the manifest that is no JSON, or no text
        raise EvaluationError(
            f"a card or description in {folder} is damaged ({error}); mend or remove it, or leave "
            "--record out"
        ) from error
    for old in replaced:
        _tell(old, entry)


def recorded(evaluations: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The results in a manifest's `evaluations`; those of another form are left out."""
    found = []
    for entry in evaluations:
        with contextlib.suppress(ValidationError):
            found.append(Result.model_validate_json(json.dumps(entry)))
    return found


def result_section(result: Result) -> str:
    """A result as a section of a Markdown page; spurious tokens with their scores in lines."""
    text = markdown(result)
    if result.task == "spurious":
        blocks = layer_table(result)
        text = text.replace(table(result), score_table(result) + "\n" * bool(blocks) + blocks)
    return text


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it at once.

    Raises:
        EvaluationError: it cannot be written.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror}); choose another file"
        ) from error


def _record(folder: Path, entry: dict[str, JsonValue]) -> list[dict[str, Any]]:
    """Returns what the manifest had in the entry's place."""
    replaced: list[dict[str, Any]] = []
    # The adapter's own, so that an artifact that is made of it carries the numbers too.
    for place, file in ((folder, MANIFEST_FILE), (folder / "adapter", DESCRIPTION_FILE)):
        if not (place / file).is_file():
            continue
        content: dict[str, Any] = json.loads((place / file).read_text(encoding="utf-8"))
        before = content.get("evaluations", [])
        if file == MANIFEST_FILE:
            replaced = [e for e in before if _key(e) == _key(entry)]
        content["evaluations"] = [*(e for e in before if _key(e) != _key(entry)), entry]
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        replace_file(place / file, text.encode())
        card = place / CARD_FILE
        text = card.read_text(encoding="utf-8") if card.is_file() else "# Refined\n"
        results = "\n".join(map(result_section, recorded(content["evaluations"])))
        text = _with_section(text, f"{START}\n\n{results}\n{END}\n")
        replace_file(card, text.encode())
    return replaced


def _tell(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = old.get("settings", {}), new["settings"]
    changes = [
        f"{name} {before.get(name, 'none')} before, {after.get(name, 'none')} now"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if _has_layers(old) and not _has_layers(new):
        changes.append("its table by block is gone")
    of = f" of {before['images']} images" if "images" in before else ""
    logger.log(
        logging.WARNING if changes else logging.INFO,
        "recorded; replaces the result%s of %s: %s",
        of,
        str(old.get("date", "an unknown date"))[:10],
        "; ".join(changes) or "the same settings",
    )


def _has_layers(entry: Mapping[str, Any]) -> bool:
    return any(BY_LAYER in row.get("details", {}) for row in entry.get("rows", ()))


def _key(entry: Mapping[str, Any]) -> list[JsonValue]:
    return [entry.get("task"), entry.get("dataset"), entry.get("settings", {}).get("size")]


def _compact(result: Result) -> Result:
    rows = []
    for row in result.rows:
        scores = tuple(
            score if len(score.values) <= _MOST_VALUES else score.model_copy(update={"values": ()})
            for score in row.scores
        )
        rows.append(row.model_copy(update={"scores": scores}))
    return result.model_copy(update={"rows": tuple(rows)})


def _with_section(text: str, section: str) -> str:
    """A card with a section where it has one, else before how to use it, else at the end."""
    before, start, rest = text.partition(START)
    if start:
        _, end, after = rest.partition(END)
        return before + section + (after.removeprefix("\n") if end else rest)
    lines = text.splitlines(keepends=True)
    for line, block in ((_HEADING, f"\n{section}"), (_BEFORE, f"{_HEADING}\n\n{section}\n")):
        for number, found in enumerate(lines):
            if found.rstrip() == line:
                at = number + (line == _HEADING)
                return "".join([*lines[:at], block, *lines[at:]])
    return f"{text.rstrip()}\n\n{_HEADING}\n\n{section}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
