"""What a report takes beside the backbones: results, a sweep's table, a run's records, the card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from backbone.artifact import Manifest
from trainer.ablate.table import Table
from trainer.adapter_file import CARD_FILE
from trainer.errors import DataError
from trainer.evaluate import results
from trainer.evaluate.errors import first_fault
from trainer.evaluate.record import END, START, recorded
from trainer.evaluate.results import Result
from trainer.record import METRICS_FILE, read_metrics
from trainer.report.verdict import plain_rows


@dataclass(frozen=True)
class Given:
    """A result, and what speaks against it.

    Attributes:
        source: The file's name, or that it is recorded in the artifact.
        warnings: For the reader: that it is of other weights.
    """

    result: Result
    source: str
    warnings: tuple[str, ...]


def gather_results(
    paths: Sequence[Path], manifest: Manifest | None, digests: Mapping[str, str]
) -> list[Given]:
    """Results of files, then those that the artifact records and no file repeats.

    Args:
        paths: JSON files of `python -m trainer.evaluate`.
        manifest: Of the refined backbone, where there is one.
        digests: Of the weights, by the backbone's title.

    Raises:
        EvaluationError: a file cannot be read, or is something else.
    """
    found = [(results.read(path), path.name) for path in paths]
    known = {_key(result) for result, _ in found}
    for result in recorded(manifest.evaluations) if manifest else ():
        if _key(result) not in known:
            found.append((result, "recorded in the artifact"))
    return [Given(one, source, _warnings(one, digests)) for one, source in found]


def _key(result: Result) -> tuple[str, str, str]:
    size = {
        name: value for name, value in result.settings.items() if name in ("size", "short_side")
    }
    return result.task, result.dataset, json.dumps(size, sort_keys=True)


def _warnings(result: Result, digests: Mapping[str, str]) -> tuple[str, ...]:
    rows = plain_rows(result)
    found = []
    # A raw backbone's digest is of its weights as loaded: in bf16 it is another than in fp32.
    is_ours = any(row.digest and row.digest == digests.get(row.subject) for row in rows)
    for row in rows:
        ours = digests.get(row.subject)
        if ours and row.digest and row.digest != ours and not (is_ours and row.subject == "raw"):
            found.append(
                f"The scores of {row.subject} are of other weights than this report shows: "
                f"digest {row.digest[:12]}, not {ours[:12]} ({row.spec or 'no source named'})."
            )
    if not any(row.subject in digests for row in rows):
        names = ", ".join(row.subject for row in rows) or "none"
        found.append(
            f"No row is of a backbone of this report ({', '.join(digests)}); the rows are: {names}."
        )
    return tuple(found)


def read_table(path: Path) -> Table:
    """A sweep's table.

    Raises:
        DataError: it cannot be read, or a key is missing or of another kind.
    """
    try:
        return Table.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give the table.json that python -m "
            "trainer.ablate wrote"
        ) from error
    except ValidationError as error:
        raise DataError(
            f"{path} is not a sweep's table ({first_fault(error)}); give the table.json that "
            "python -m trainer.ablate wrote"
        ) from error


def read_run(run: Path | None, artifact: Path | None) -> list[dict[str, float]]:
    """The records of a run, one per step; those of the artifact's own run without a folder.

    Raises:
        DataError: the folder that was named has no records.
    """
    if run is not None:
        if not (run / METRICS_FILE).is_file():
            raise DataError(f"{run} has no {METRICS_FILE}; give the folder of a run")
        return read_metrics(run)
    return read_metrics(artifact.resolve().parent) if artifact is not None else []


def read_card(artifact: Path | None) -> str:
    """The artifact's model card; empty without one.

    What `--record` wrote into it is left out: the page shows it as results.
    """
    if artifact is None or not (artifact / CARD_FILE).is_file():
        return ""
    text = (artifact / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}See the results above.\n{after}" if start and end else text
