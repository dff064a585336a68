"""Probes that were trained and scored before: a run that was killed goes on with the next seed.

finished = FinishedProbes(Path("runs/features/probes"))
probe = finished.once({"seed": 0, ...}, SegmentationProbe, lambda: segmentation_probe(...))
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

from trainer.evaluate.errors import StoreError

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
        _replace(path, adapter.dump_json(probe, indent=2))
        return probe


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the bytes of files in their order.

    Raises:
        StoreError: One cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"a finished probe cannot be written to {path.parent} ({error.strerror}); give another "
            "folder by --features DIR, or --features none"
        ) from error
