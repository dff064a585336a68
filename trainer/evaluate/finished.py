"""Probes that were trained and scored before: a run that was killed goes on with the next seed.

finished = FinishedProbes(Path("runs/features/probes"))
probe = finished.once({"seed": 0, ...}, SegmentationProbe, lambda: segmentation_probe(...))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

from trainer.evaluate.errors import StoreError
from trainer.evaluate.files import replace_file
from trainer.evaluate.reading import read_ahead

logger = logging.getLogger(__name__)

# Part of every key: raise it when a probe of the same settings gives other scores.
PROBE_VERSION = 1

Probe = TypeVar("Probe")


class FinishedProbes:
    """A JSON file per probe, named by a digest of all that decides it.

    Args:
        folder: Where files go; made when one is written. None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def once(
        self,
        decides: Mapping[str, JsonValue],
        kind: type[Probe],
        measure: Callable[[], Probe],
    ) -> Probe:
        """The probe of these settings, from its file or measured now.

        Args:
            decides: All that the scores depend on.
            kind: A dataclass of numbers.
            measure: Trains and scores it.

        Raises:
            StoreError: The folder cannot be written.
        """
        if self._folder is None:
            return measure()
        content = json.dumps({"version": PROBE_VERSION, **decides}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"
        adapter = TypeAdapter(kind)
        try:
            found = adapter.validate_json(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValidationError) as error:
            logger.warning("%s is damaged (%s): the probe is trained again", path, error)
        else:
            logger.info("found %s", path)
            return found
        probe = measure()
        try:
            replace_file(path, adapter.dump_json(probe, indent=2))
        except OSError as error:
            raise StoreError(
                f"a finished probe cannot be written to {self._folder} ({error.strerror}); give "
                "another folder by --features DIR, or --features none"
            ) from error
        return probe


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the bytes of files in their order.

    Raises:
        StoreError: One cannot be read.
    """
    digest = hashlib.sha256()
    for of_file in read_ahead(files, _file_digest):
        digest.update(of_file)
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error.strerror}); copy or unpack the data set again"
        ) from error
