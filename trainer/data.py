"""Training images: a folder, an order, and batches that are ready in time.

    folder = ImageFolder.scan(images, seed=0, max_images=5000)
    for batch in batches(folder, section, size=512, seed=0):
        batch.images                     # uint8 [B, 3, size, size]

Images come as one endless stream, epoch after epoch, each in an order of its own that follows from
the seed. A position in that stream is all that a checkpoint needs.

Dimension key: B = images, S = side in pixels.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from backbone.errors import ImageError
from backbone.preprocess import load_image, resize_image
from trainer.config import DataSection
from trainer.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder and everything below it, in a fixed order."""

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
        found: list[Path] = []
        for folder, folders, names in os.walk(root, onerror=_refuse_unlisted):
            folders.sort()
            found += [Path(folder, n) for n in names if Path(n).suffix.lower() in SUFFIXES]
        found.sort(key=lambda path: path.relative_to(root).as_posix())
        if not found:
            raise DataError(f"no images under {root}; it needs files of {', '.join(SUFFIXES)}")
        chosen = found
        if max_images is not None and len(found) > max_images:
            generator = torch.Generator().manual_seed(seed)
            picks = torch.randperm(len(found), generator=generator)[:max_images]
            chosen = [found[pick] for pick in sorted(picks.tolist())]
            logger.info("%d of %d images are used (data.max_images)", max_images, len(found))
        return cls(root, tuple(chosen), len(found))

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """SHA-256 over names, relative to the folder, and sizes in bytes."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(os.fsencode(path.relative_to(self.root)) + b"\t")
            # A link to nowhere is an unreadable image, which is met when it is its turn.
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{size}\n".encode())
        return digest.hexdigest()

    def order(self, epoch: int, seed: int) -> list[int]:
        """The order in which an epoch goes through the files."""
        generator = torch.Generator().manual_seed((seed << 24) + epoch + 1)
        return torch.randperm(len(self), generator=generator).tolist()


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be listed ({error.strerror}); make it readable, or "
        "move it away"
    ) from error


class Batch(NamedTuple):
    """`images` uint8 [B, 3, S, S]; `position` in the stream of the image after them."""

    images: Tensor
    position: int


@dataclass
class BadImages:
    """What is done about files that cannot be read: stop, or skip and remember them."""

    skip: bool
    paths: set[Path] = field(default_factory=set)

    def meet(self, path: Path, error: Exception) -> None:
        """Note an unreadable file.

        Raises:
            DataError: they are not to be skipped.
        """
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        if not self.skip:
            raise DataError(
                f"unreadable image {message}; remove it, or skip such files with --skip-bad-images"
            ) from error
        if path not in self.paths:
            logger.warning("skipped unreadable image %s", message)
            self.paths.add(path)


def square_image(path: Path, *, size: int, section: DataSection) -> Tensor:
    """Read one image as uint8 [3, size, size]."""
    pixels = load_image(path, max_pixels=section.max_pixels)
    if section.fit == "crop":
        pixels = transforms.center_crop(pixels, [min(pixels.shape[-2:])] * 2)
    return resize_image(pixels, (size, size)).contiguous()


def batches(
    folder: ImageFolder,
    section: DataSection,
    *,
    size: int,
    seed: int,
    bad: BadImages,
    position: int = 0,
) -> Generator[Batch, None, None]:
    """Endless batches of `section.batch_size` images from `position` on, decoded ahead by threads.

    Raises:
        DataError: an unreadable file that is not to be skipped, or not one readable file.
    """
    window = 2 * section.batch_size + section.workers
    pending: deque[tuple[int, Path, Future[Tensor]]] = deque()
    stream = _stream(folder, seed, position)
    pool = ThreadPoolExecutor(section.workers, thread_name_prefix="images")
    try:
        images: list[Tensor] = []
        while True:
            while len(pending) < window:
                index, path = next(stream)
                task = pool.submit(square_image, path, size=size, section=section)
                pending.append((index, path, task))
            index, path, task = pending.popleft()
            try:
                images.append(task.result())
            except (ImageError, OSError) as error:
                bad.meet(path, error)
                if len(bad.paths) == len(folder):
                    raise DataError(f"not one of {len(folder)} images could be read") from error
                continue
            if len(images) == section.batch_size:
                yield Batch(torch.stack(images), index + 1)
                images = []
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stream(folder: ImageFolder, seed: int, position: int) -> Iterator[tuple[int, Path]]:
    while True:
        epoch, start = divmod(position, len(folder))
        for file in folder.order(epoch, seed)[start:]:
            yield position, folder.files[file]
            position += 1
