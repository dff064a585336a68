"""Where training images lie: a folder, a list of files, or tar shards, behind one interface.

    source = find_images("photos", seed=0, max_images=5000)
    source.read(source.order(epoch=0, seed=0)[0])       # the bytes of the first file of an epoch

A source is a fixed sequence of encoded files. Everything random about it follows from a seed.
"""

import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch

from trainer.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TAR = ".tar"
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

T = TypeVar("T")


class Source(ABC):
    """Encoded image files in a fixed order; safe to read from several threads.

    Attributes:
        num_found: Images before `max_images` of them were chosen.
    """

    num_found: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, index: int) -> Path:
        """What an image is called in messages: its path, for a shard's member `SHARD/MEMBER`."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded file.

        Raises:
            OSError: it cannot be read.
            DataError: a shard is not what it was when it was indexed.
        """

    @abstractmethod
    def _entries(self) -> Iterator[tuple[bytes, int]]:
        """Name, wherever the source lies, and size in bytes of every image."""

    def fingerprint(self) -> str:
        """SHA-256 over names, which do not depend on where the source lies, and sizes in bytes."""
        digest = hashlib.sha256()
        for name, size in self._entries():
            digest.update(name + f"\t{size}\n".encode())
        return digest.hexdigest()

    def order(self, epoch: int, seed: int) -> list[int]:
        """The order in which an epoch goes through the images."""
        generator = torch.Generator().manual_seed((seed << 24) + epoch + 1)
        return torch.randperm(len(self), generator=generator).tolist()


@dataclass(frozen=True)
class ImageFolder(Source):
    """Image files, each by its path: those of a folder and everything below it, or of a list."""

    root: Path
    files: tuple[Path, ...]
    num_found: int

    @classmethod
    def scan(cls, root: str | Path, *, seed: int, max_images: int | None) -> Self:
        """Find the images under `root`, and choose `max_images` of them if there are more.

        Links to files are followed, links to folders are not.

        Raises:
            DataError: not a folder, no images in it, or a folder below it that cannot be listed.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give a folder of images")
        found = files_under(root, SUFFIXES)
        if not found:
            raise DataError(f"no images under {root}; it needs files of {', '.join(SUFFIXES)}")
        return cls(root, tuple(choose(found, seed=seed, max_images=max_images)), len(found))

    @classmethod
    def from_list(cls, path: str | Path, *, seed: int, max_images: int | None) -> Self:
        """The files that a text file lists, and `max_images` of them if there are more.

        One path a line, relative to the list's folder or absolute; empty lines and those that
        start with `#` are left out. A file may be listed twice, and is two images then.

        Raises:
            DataError: the list cannot be read, is empty, or not one of its files exists.
        """
        path = Path(path)
        try:
            lines = [os.fsdecode(line.strip()) for line in path.read_bytes().splitlines()]
        except OSError as error:
            raise DataError(f"the list {path} cannot be read: {error}") from error
        found = [path.parent / line for line in lines if line and not line.startswith("#")]
        if not found:
            raise DataError(f"{path} lists no files; write the path of an image in each line")
        if not any(file.is_file() for file in found):
            raise DataError(
                f"not one of the {len(found)} files in {path} exists, the first is {found[0]}; "
                "write paths relative to the list's folder, or absolute ones"
            )
        chosen = choose(found, seed=seed, max_images=max_images)
        return cls(path.parent, tuple(chosen), len(found))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.files[index]

    def read(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def _entries(self) -> Iterator[tuple[bytes, int]]:
        for path in self.files:
            # A link to nowhere is an unreadable image, which is met when it is its turn.
            size = path.stat().st_size if path.exists() else -1
            yield os.fsencode(os.path.relpath(path, self.root)), size


def find_images(images: str | Path, *, seed: int, max_images: int | None) -> Source:
    """The source that `--images` names, with `max_images` of its images if there are more.

    Args:
        images: A folder of images, or of .tar shards if no images are in it; one shard, or several
            by a pattern as `train-{0000..0015}.tar`; or a text file that lists images.
        seed: Chooses the images.
        max_images: None for all.

    Raises:
        DataError: there is nothing of that kind, or no image in it.
    """
    from trainer.data.shards import TarShards, expand  # here: it builds on this module

    path = Path(images)
    if _URL.match(str(images)):
        raise DataError(f"{images} is not a local path; copy the images here first")
    if path.is_dir():
        shards = files_under(path, (TAR,))
        if not shards or files_under(path, SUFFIXES):
            if shards:
                logger.warning(
                    "%s has images, so its %d .tar files are not read; to read them, name them by "
                    "a pattern",
                    path,
                    len(shards),
                )
            return ImageFolder.scan(path, seed=seed, max_images=max_images)
        return TarShards.index(shards, seed=seed, max_images=max_images)
    if str(images).endswith(_COMPRESSED_TARS):
        raise DataError(
            f"{images} is compressed, and shards are read in any order; unpack it first"
        )
    if str(images).endswith(TAR):
        shards = [path] if path.exists() else expand(str(images))
        return TarShards.index(shards, seed=seed, max_images=max_images)
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path} is one image; give a folder of them, a list, or tar shards")
    if path.is_file():
        return ImageFolder.from_list(path, seed=seed, max_images=max_images)
    raise DataError(
        f"{images} is not a folder; give a folder of images, a text file that lists some, or tar "
        "shards, as in 'train-{0000..0015}.tar'"
    )


def files_under(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with such names under a folder, in the order of their relative paths.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_refuse_unlisted):
        folders.sort()
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    return found


def choose(found: Sequence[T], *, seed: int, max_images: int | None) -> Sequence[T]:
    """`max_images` of the images found, at random, in the order in which they were found."""
    if max_images is None or len(found) <= max_images:
        return found
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(found), generator=generator)[:max_images]
    logger.info("%d of %d images are used (data.max_images)", max_images, len(found))
    return [found[pick] for pick in sorted(picks.tolist())]


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be listed ({error.strerror}); make it readable, or "
        "move it away"
    ) from error
