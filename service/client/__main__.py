"""python -m service.client IMAGE... --out features.safetensors [--url --size ...]; see `--help`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from service.client.errors import FeatureError
from service.client.feature_file import FeatureFile, FeatureFileError
from service.client.requests import Dtype, Layout
from service.client.sync_client import FeatureClient

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """Arguments that lead nowhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask for features of images and save them; the exit status is explained in `--help`."""
    chosen = _parser().parse_args(arguments)
    try:
        images = find_images(chosen.images)
        key = read_key(chosen.api_key_file)
        check_output(chosen.out)
        client = FeatureClient(
            chosen.url,
            api_key=key,
            model=chosen.model,
            timeout_seconds=chosen.timeout,
            max_connections=chosen.connections,
            batch_images=chosen.batch_images,
        )
    except (UsageError, ValueError) as error:
        return _complain(f"error: {error}", _USAGE)
    try:
        with client, FeatureFile(chosen.out) as file:
            failures = fetch(client, images, file, chosen_options(chosen))
            if file.num_images:
                file.save()
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was saved", _INTERRUPTED)
    except (OSError, FeatureFileError) as error:
        return _complain(f"error: {chosen.out}: {error}", _FAILED)
    for failure in failures:
        _complain(f"error: {failure}", _FAILED)
    saved = f"saved features of {file.num_images} of {len(images)} images"
    _complain(f"{saved} to {chosen.out}" if file.num_images else "nothing was saved", 0)
    return _FAILED if failures else 0


def check_output(path: Path) -> None:
    """Refuse a place that nothing can be written to, before anything is asked for.

    Raises:
        UsageError: a folder, or a file in a folder that does not exist.
    """
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"--out {path}: there is no folder {path.absolute().parent}; make it first"
        )


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """Image files by the name of their tensors; folders are searched.

    A file is called as it was given, one in a folder by its path from the only folder given, or
    else as it was given.

    Raises:
        UsageError: a path that does not exist, or no image at all.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            root = path if len(paths) == 1 else Path()
            for file in sorted(_walk(path)):
                found[os.path.relpath(file, root) if root != Path() else file.as_posix()] = file
        elif path.exists():
            found[path.as_posix()] = path
        else:
            raise UsageError(f"{path} does not exist")
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"no images in {', '.join(map(str, paths))}; searched for {suffixes}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(root) / name


def read_key(path: Path | None) -> str | None:
    """The API key in a file.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise UsageError(f"--api-key-file {path}: {error.strerror}") from error
    if not key or len(key.split()) > 1:
        raise UsageError(f"--api-key-file {path} holds {len(key.split())} words; give one key")
    return key


def chosen_options(chosen: argparse.Namespace) -> dict[str, Any]:
    """Options of `FeatureClient.stream` that the command line names."""
    options = {name: getattr(chosen, name) for name in ("dtype", "layout", "layers", "include")}
    options = {name: value for name, value in options.items() if value is not None}
    if chosen.size is not None:
        options["size"] = chosen.size[0] if len(chosen.size) == 1 else tuple(chosen.size)
    if chosen.normalize:
        options["normalize"] = True
    return options


def fetch(
    client: FeatureClient, images: dict[str, Path], file: FeatureFile, options: dict[str, Any]
) -> list[str]:
    """Add the features of all images to a file, under a progress bar; returns what failed.

    Raises:
        OSError: the disk is full.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    names = list(images)
    failures: list[str] = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    rate = TextColumn("{task.fields[failed]}")
    with Progress(
        *columns, rate, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("features", total=len(names), failed="")
        try:
            for index, outcome in client.stream(images.values(), **options):
                try:
                    if isinstance(outcome, FeatureError):
                        raise outcome
                    file.add(names[index], outcome)
                except FeatureError as error:
                    failures.append(f"{names[index]}: {error.about(None)}")
                except FeatureFileError as error:
                    failures.append(str(error))
                failed = f"{len(failures)} failed" if failures else ""
                progress.update(task, advance=1, failed=failed)
        except FeatureError as error:  # what every further image would meet
            num_missing = len(names) - file.num_images - len(failures)
            failures.append(f"{num_missing} images: {error}")
    return failures


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.client",
        description="Ask a feature service for the features of images and save them as one "
        "safetensors file: a tensor for each image, under its relative path, and what is known "
        "about it in the metadata `images`.",
        epilog="Exit status: 0 when every image has its features, 1 when some failed (they are "
        "listed, the others are saved), 2 for arguments that lead nowhere.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of them")
    add("--out", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    add("--url", default="http://127.0.0.1:8000", help="of the service (default %(default)s)")
    add("--size", type=_numbers, metavar="PX", help="longest side, or HEIGHT,WIDTH")
    add("--layers", type=_numbers, metavar="N,...", help="block numbers (--layers=-1,-4)")
    add("--dtype", choices=get_args(Dtype), help="number format (default float16)")
    add("--layout", choices=get_args(Layout), help="shape of an image's features (default grid)")
    add("--normalize", action="store_true", help="scale every vector to unit length")
    add("--include", type=_words, metavar="PART,...", help="registers, cls, spurious")
    add("--model", metavar="NAME", help="which of the service's models (default its first)")
    add("--api-key-file", type=Path, metavar="FILE", help="file that holds the API key")
    add("--connections", type=int, default=4, metavar="N", help="requests in flight (%(default)s)")
    add("--batch-images", type=int, default=8, metavar="N", help="images in one (%(default)s)")
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds without progress (60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
