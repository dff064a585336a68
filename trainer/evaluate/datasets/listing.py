"""Which files belong together; looks at names only and reads no pixels."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trainer.evaluate.datasets.samples import DatasetError, Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Existing:
    """Whether files exist, by one listing per folder: lists of data sets have 100,000 lines."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __call__(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
        return path.name in self._names[folder]


def find_images(
    folder: Path, pattern: str = "*", *, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """Images in a folder whose path below it fits a pattern, sorted; hidden files are left out.

    Raises:
        DatasetError: There is none.
    """
    images = sorted(
        (
            path
            for path in folder.glob(pattern)
            if path.suffix.lower() in suffixes and not path.name.startswith(".")
        ),
        key=str,
    )
    if not images:
        raise DatasetError(
            f"no images in {folder / pattern if pattern != '*' else folder}; they end in "
            f"{', '.join(suffixes)}"
        )
    return images


def pair(
    images: Sequence[Path],
    targets_of: Callable[[Path], Iterable[Path]],
    *,
    folder: Path,
    what: str = "label",
) -> tuple[Sample, ...]:
    """Put each image and the file with what is known of it together.

    Args:
        targets_of: Where the target of an image may lie; the first one that exists is taken.
        folder: What names of samples are relative to.
        what: The target, for errors.

    Raises:
        DatasetError: Targets are missing, or two images have the same one.
    """
    exists = Existing()
    # By text: comparing 100,000 paths takes seconds.
    samples: dict[str, Sample] = {}
    missing: list[Path] = []
    for image in images:
        candidates = list(targets_of(image))
        target = next(filter(exists, candidates), None)
        if target is None:
            missing.append(candidates[0])
        elif str(target) in samples:
            raise DatasetError(
                f"{samples[str(target)].image} and {image} have the same {what} {target}; "
                "remove one of the two images"
            )
        else:
            name = image.relative_to(folder).with_suffix("").as_posix()
            samples[str(target)] = Sample(name, image, target)
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(images)} images in {_common_folder(images)} have no {what}; "
            f"the first missing one is {missing[0]}"
        )
    return tuple(samples.values())


def _common_folder(images: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([image.parent for image in images]))


def check_exist(images: Sequence[Path], listed_in: Path) -> None:
    """Refuse a list that names images which are not there."""
    exists = Existing()
    missing = [image for image in images if not exists(image)]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(images)} images that {listed_in} lists do not exist; the "
            f"first one is {missing[0]}"
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a list of samples, stripped, without empty ones.

    Raises:
        DatasetError: It is missing, no text, empty, or names a sample twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; it lists the samples, one per line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as a list of samples: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DatasetError(f"{path} is empty; it lists the samples, one per line")
    seen: set[str] = set()
    for line in lines:
        if line in seen:
            raise DatasetError(f"{path} lists {line!r} twice; remove one of the two lines")
        seen.add(line)
    return lines
