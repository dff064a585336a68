"""Token grids on disk: computed once, found again by whoever asks for the same.

    store = FeatureStore(Path("runs/features"))
    grids = store.features(subject, dataset.train, size=(352, 480))
    grids[0]                                # float16 [h, w, C], read now

A file's name is a digest of all that decides its content: the subject's key, the bytes of the image
file, the size and the windows. A run that was killed goes on with what is missing; runs that write
at the same time write the same. A file appears whole or not at all, and one that was damaged since
is noticed by its checksum and computed again.

An image takes `2 * h * w * C` bytes: 0.5 MiB for 352x480 px, patches of 16 px and 384 channels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import __version__ as pillow_version
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.evaluate import images
from trainer.evaluate.encoding import encode_files
from trainer.evaluate.errors import StoreError
from trainer.evaluate.files import PART_PREFIX, replace_file
from trainer.evaluate.images import Size
from trainer.evaluate.progress import SILENT, Progress
from trainer.evaluate.reading import READ_THREADS, LazyTensors
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows

logger = logging.getLogger(__name__)

_FORMAT = 1
# What a run that was killed left behind; one that still writes is done in far less.
_STALE_SECONDS = 3600.0
_MIB = 2.0**20
_MAX_HALF = torch.finfo(torch.float16).max


class ImageSample(Protocol):
    """Whatever has an image file."""

    @property
    def image(self) -> Path: ...


@dataclass(frozen=True)
class _Entry:
    """One image as it is asked for.

    Attributes:
        image: Its file.
        size: (h, w) in pixels that it is encoded at.
        header: What the features are of, as stored beside them.
    """

    image: Path
    size: tuple[int, int]
    header: dict[str, str]

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()


class FeatureStore:
    """Features of images, kept in a folder or in memory.

    Args:
        folder: Where files go, in a folder for each subject; made when something is written. None:
            they are kept in memory, as long as the store.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Tensor] = {}
        if folder is not None:
            _remove_stale(folder)

    def features(
        self,
        subject: Subject,
        samples: Sequence[ImageSample],
        *,
        size: Size,
        windows: Windows | None = None,
        batch_size: int = 16,
        progress: Progress = SILENT,
        title: str = "encode",
    ) -> LazyTensors:
        """Token grids `[h, w, C]` of samples in their order; what is missing is computed now.

        In float16: half the room of float32, and finer than what a probe can tell; float32 of
        images whose values float16 cannot hold.

        Args:
            subject: Encodes.
            samples: Whose images.
            size: (h, w) in pixels for all of them, or by the short side.
            windows: See `encode_grid`.
            batch_size: Most images that are encoded at once.
            progress: Is told how far this is.
            title: Of the stage, before the subject's name.

        Raises:
            EvaluationError: a size that is not whole patches, an image that cannot be read, values
                that are not finite, or a folder that cannot be written.
        """
        images.check_size(size, subject.patch_size, subject.name)
        if windows is not None:
            windows.check(subject.patch_size)
        entries = self._entries(subject, samples, size, windows)
        missing = [entry for entry in entries if not self._has(subject, entry)]
        unique = list({entry.name: entry for entry in missing}.values())
        started = time.monotonic()

        def compute(wanted: Sequence[_Entry], advance: Callable[[int], None]) -> None:
            files = [(entry.image, entry.size) for entry in wanted]
            done = encode_files(subject, files, windows=windows, batch_size=batch_size)
            is_announced = len(wanted) == 1
            for batch, grid_BhwC in done:
                for index, grid_hwC in zip(batch, grid_BhwC, strict=True):
                    stored_hwC = _stored(grid_hwC, wanted[index].image, subject)
                    if not is_announced:
                        self._announce(subject, stored_hwC, len(wanted))
                        is_announced = True
                    self._put(subject, wanted[index], stored_hwC)
                advance(len(batch))

        def read(index: int) -> Tensor:
            entry = entries[index]
            grid_hwC = self._get(subject, entry)
            if grid_hwC is None:
                compute([entry], lambda _: None)
                grid_hwC = self._get(subject, entry)
            if grid_hwC is None:
                raise StoreError(
                    f"{self._path(subject, entry)} was written and cannot be read back; check the "
                    "disk, or give --features none"
                )
            return grid_hwC

        if unique:
            present = len(entries) - len(missing)
            stage = progress.stage(f"{title} {subject.name}", present + len(unique), done=present)
            with stage as advance:
                compute(unique, advance)
        logger.info(
            "features of %s (%s): %d images, %d computed in %.0f s, %d found in %s",
            subject.name,
            subject.digest[:12],
            len(entries),
            len(unique),
            time.monotonic() - started,
            len(entries) - len(missing),
            self.folder or "memory",
        )
        return LazyTensors(len(entries), read)

    def _entries(
        self,
        subject: Subject,
        samples: Sequence[ImageSample],
        size: Size,
        windows: Windows | None,
    ) -> list[_Entry]:
        def entry(sample: ImageSample) -> _Entry:
            data = images.read_bytes(sample.image)
            original = images.original_size(sample.image, data)
            pixels = images.resolve(size, original, subject.patch_size)
            header = {
                "format": str(_FORMAT),
                "subject": subject.key,
                "image": hashlib.sha256(data).hexdigest(),
                "size": f"{pixels[0]}x{pixels[1]}",
                "windows": f"{windows.size}/{windows.stride}" if windows else "",
                "reader": f"{images.READER_VERSION} pillow {pillow_version}",
            }
            return _Entry(sample.image, pixels, header)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return list(pool.map(entry, samples))

    def _path(self, subject: Subject, entry: _Entry) -> Path:
        assert self.folder is not None  # what is kept in memory has no path
        return self.folder / subject.key[:16] / f"{entry.name}.safetensors"

    def _has(self, subject: Subject, entry: _Entry) -> bool:
        if self.folder is None:
            return entry.name in self._memory
        return self._path(subject, entry).is_file()

    def _get(self, subject: Subject, entry: _Entry) -> Tensor | None:
        """The stored grid; None where there is none that is whole and of this entry."""
        if self.folder is None:
            return self._memory.get(entry.name)
        path = self._path(subject, entry)
        try:
            data = path.read_bytes()  # not mapped: what others do to the file must not change it
            (length,) = struct.unpack_from("<Q", data)
            header: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
            grid_hwC: Tensor = load(data)["grid"]
        except FileNotFoundError:
            logger.warning("%s is gone: it is computed again", path)
            return None
        except (
            OSError,
            SafetensorError,
            struct.error,
            ValueError,
            LookupError,
            TypeError,
        ) as error:
            logger.warning("%s is damaged (%s): it is computed again", path, error)
            return None
        checksum = header.pop("checksum", "")
        if header != entry.header or checksum != _checksum(grid_hwC):
            logger.warning("%s is damaged (its checksum is another): it is computed again", path)
            return None
        return grid_hwC

    def _put(self, subject: Subject, entry: _Entry, grid_hwC: Tensor) -> None:
        if self.folder is None:
            self._memory[entry.name] = grid_hwC
            return
        path = self._path(subject, entry)
        header = {**entry.header, "checksum": _checksum(grid_hwC)}
        try:
            replace_file(path, save({"grid": grid_hwC}, metadata=header))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        more = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return StoreError(
            f"features cannot be written to {self.folder} ({error.strerror}); {more}give "
            "another folder by --features DIR, or --features none to keep them in memory"
        )

    def _announce(self, subject: Subject, grid_hwC: Tensor, count: int) -> None:
        """How large it gets, once the first grid shows how many channels there are."""
        num_bytes = grid_hwC.numel() * grid_hwC.element_size()
        total = num_bytes * count
        logger.info(
            "features of %s: %s as float16 are %.2f MiB an image, %.0f MiB for %d images, in %s",
            subject.name,
            "x".join(map(str, grid_hwC.shape)),
            num_bytes / _MIB,
            total / _MIB,
            count,
            self.folder or "memory",
        )
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._unwritable(error) from error
        if total > free:
            raise StoreError(
                f"the features of {count} images need {total / _MIB:.0f} MiB, and {self.folder} "
                f"has {free / _MIB:.0f} MiB left; make room, or give another folder by --features "
                "DIR, a smaller --size, or --features none to keep them in memory"
            )


def _stored(grid_hwC: Tensor, image: Path, subject: Subject) -> Tensor:
    largest = float(grid_hwC.abs().max())
    if not largest < float("inf"):
        raise StoreError(
            f"{subject.name} gives values for {image} that are not finite; measure it with "
            "--precision fp32, and if that does not help, its weights are damaged"
        )
    is_half = largest <= _MAX_HALF
    return grid_hwC.to(torch.float16 if is_half else torch.float32, copy=True).contiguous()


def _checksum(grid_hwC: Tensor) -> str:
    return f"{zlib.crc32(grid_hwC.contiguous().reshape(-1).view(torch.uint8).numpy().data):08x}"


def _remove_stale(folder: Path) -> None:
    """Parts of files that killed runs left."""
    for path in folder.glob(f"*/{PART_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:
            continue  # another process was faster, or may write there where this one may not
