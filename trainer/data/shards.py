"""Tar shards in the WebDataset format, read in any order without unpacking them.

    shards = TarShards.index(expand("train-{0000..0015}.tar"), seed=0, max_images=None)
    shards.read(7)                                  # the bytes of one member, by its offset

A sample is the members of a shard that share a key: their path up to the first dot of the name.
The rest of the name says what a member is: `jpg`, `json`, `seg.png`. A sample's image is its first
member whose rest is the suffix of an image.
"""

import itertools
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from trainer.data.sources import SUFFIXES, Source, choose
from trainer.errors import DataError

logger = logging.getLogger(__name__)

_BLOCK = 512  # bytes: a tar file's unit
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Member(NamedTuple):
    """Where an image is: shard by its number, offset and size in bytes."""

    shard: int
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarShards(Source):
    """The images of tar files. The index is in memory, the files are opened for every read."""

    shards: tuple[Path, ...]
    members: tuple[Member, ...]
    num_found: int

    @classmethod
    def index(cls, shards: Sequence[str | Path], *, seed: int, max_images: int | None) -> Self:
        """Read the headers of shards, and choose `max_images` images if there are more.

        Raises:
            DataError: a shard is missing, truncated or damaged, or there is no image in them.
        """
        paths = tuple(Path(shard) for shard in shards)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} shards do not exist: "
                f"{', '.join(map(str, missing[:3]))}{', ...' if len(missing) > 3 else ''}"
            )
        found: list[Member] = []
        num_left_out = 0
        for number, path in enumerate(paths):
            members, left_out = _index_one(number, path)
            found += members
            num_left_out += left_out
        if num_left_out:
            logger.info(
                "%d image files in the shards are not the first of their sample, or are a field of "
                "their own such as seg.png: they are left out",
                num_left_out,
            )
        if not found:
            raise DataError(
                f"no images in {len(paths)} shards, the first is {paths[0]}; they need members "
                f"such as 000123.jpg, of {', '.join(SUFFIXES)}"
            )
        chosen = choose(found, seed=seed, max_images=max_images)
        return cls(paths, tuple(chosen), len(found))

    def __len__(self) -> int:
        return len(self.members)

    def path(self, index: int) -> Path:
        member = self.members[index]
        return Path(f"{self.shards[member.shard]}/{member.name}")  # the name may start with /

    def read(self, index: int) -> bytes:
        member = self.members[index]
        path = self.shards[member.shard]
        # Not kept open: a run may have more shards than a process may have files.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, member.size, member.offset)
        finally:
            os.close(descriptor)
        if len(data) != member.size:
            raise DataError(f"the shard {path} has become shorter during the run; start it anew")
        return data

    def _entries(self) -> Iterator[tuple[bytes, int]]:
        for member in self.members:
            shard = os.fsencode(self.shards[member.shard].name)
            yield shard + b"/" + os.fsencode(member.name), member.size


def expand(pattern: str) -> list[Path]:
    """Paths of a pattern with braces: `{0000..0015}` counts, `{a,b}` lists; zeros in front stay.

    Raises:
        DataError: braces that are neither, or a range that does not ascend.
    """
    pieces: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        pieces += [[pattern[end : match.start()]], _alternatives(match[1], pattern)]
        end = match.end()
    pieces.append([pattern[end:]])
    return [Path("".join(parts)) for parts in itertools.product(*pieces)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last = bounds.groups()
        if int(first) <= int(last):
            return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    elif "," in inside:
        return inside.split(",")
    raise DataError(
        f"{{{inside}}} in {pattern} is no range of shards; write it as {{0000..0015}} or {{a,b}}"
    )


def _index_one(number: int, path: Path) -> tuple[list[Member], int]:
    """The images of a shard, and how many image files are not one."""
    images: dict[str, Member] = {}
    num_left_out = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                if info.size < 0:  # the next header would lie before this one, over and over
                    raise DataError(
                        f"the shard {path} is damaged: {info.name} has {info.size} bytes; write or "
                        "copy it again"
                    )
                parts = _KEY.fullmatch(info.name)
                if parts is None or Path(info.name).suffix.lower() not in SUFFIXES or info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    _refuse_link(path, info)
                key, field = parts.groups()
                if "." in field or key in images:
                    num_left_out += 1
                else:
                    images[key] = Member(number, info.name, info.offset_data, info.size)
            _check_end(tar, path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"the shard {path} is damaged or incomplete ({error}); write or copy it again"
        ) from error
    return list(images.values()), num_left_out


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Refuse a shard whose headers end in anything but the block of zeros that ends a tar file.

    `tarfile` takes the end of the file, or a damaged header, for the end of the archive.
    """
    assert tar.fileobj is not None  # opened by path
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        what = "a damaged header" if len(block) == _BLOCK else "no end mark: it was cut off"
        raise DataError(
            f"the shard {path} is damaged or incomplete (at byte {tar.offset} is {what}); write or "
            "copy it again"
        )


def _refuse_link(path: Path, info: tarfile.TarInfo) -> None:
    raise DataError(
        f"{info.name} in the shard {path} is a link or not an ordinary file; write the shard with "
        "files (tar --dereference --hard-dereference)"
    )
