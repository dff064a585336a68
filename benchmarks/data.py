"""Loading speed: images per second by source and by where they are resized.

    python -m benchmarks.data --images photos --size 512 --workers 2

The folder's images are also put into a list and into tar shards, in a temporary folder. Rounds of
the variants alternate, so that a busy machine disturbs all alike, and the median round counts.
Files come from the page cache: this is the cost of decoding and resizing, not of a disk.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

from backbone import find_devices
from trainer.config import DataSection
from trainer.data import BadImages, Batches, ImageFolder, Source, find_images

_SHARD = 1000  # images


class Speed(NamedTuple):
    """Images per second of a round.

    Attributes:
        taken: As they came out of the loader.
        per_core: Per second of processor time, with everything that the process did.
        loader: What the loader says of itself: `Batches.loader_rate`.
    """

    taken: float
    per_core: float
    loader: float


def measure(
    source: Source, section: DataSection, *, size: int, count: int, device: torch.device
) -> Speed:
    """Take about `count` images in whole batches, after a first one that fills the pipeline."""
    stream = Batches(source, section, size=size, seed=0, bad=BadImages(skip=False), device=device)
    num_batches = max(1, count // section.batch_size)
    with contextlib.closing(stream):
        next(stream)
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(num_batches):
            next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        num_images = num_batches * section.batch_size
        return Speed(num_images / seconds, num_images / cpu_seconds, stream.loader_rate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    device = torch.device(find_devices(options.device)[0])
    with tempfile.TemporaryDirectory() as scratch:
        folder = ImageFolder.scan(options.images, seed=0, max_images=options.count)
        if options.enlarge:
            folder = _enlarged(folder, Path(scratch, "enlarged"), options.enlarge)
        variants = _variants(folder, Path(scratch), options.workers, options.batch)
        rounds: dict[tuple[str, str], list[Speed]] = {key: [] for key in variants}
        for _ in range(options.rounds):
            for key, (source, section) in variants.items():
                rounds[key].append(
                    measure(source, section, size=options.size, count=options.count, device=device)
                )
        sys.stdout.write(_table(folder, rounds, options, device))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Measure how fast training images are loaded, by source and by resize.",
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    add("--size", type=int, default=512, help="side of the training images in pixels")
    add("--workers", type=int, default=2, help="threads that decode")
    add("--batch", type=int, default=16, help="images in a batch")
    add("--count", type=int, default=320, help="images used, and taken in each round")
    add("--rounds", type=int, default=3, help="rounds of each variant; the median counts")
    add("--enlarge", type=int, metavar="PX", help="first enlarge the images to this longest side")
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="where images go")
    return parser


def _variants(
    folder: ImageFolder, scratch: Path, workers: int, batch: int
) -> dict[tuple[str, str], tuple[Source, DataSection]]:
    listing = scratch / "list.txt"
    listing.write_text("".join(f"{path.resolve()}\n" for path in folder.files))
    for number, start in enumerate(range(0, len(folder), _SHARD)):
        with tarfile.open(scratch / f"shard-{number:04}.tar", "w") as tar:
            for index in range(start, min(start + _SHARD, len(folder))):
                data = folder.read(index)
                member = tarfile.TarInfo(f"{index:08}{folder.path(index).suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    last = (len(folder) - 1) // _SHARD
    pattern = scratch / f"shard-{{0000..{last:04}}}.tar"
    sources: dict[str, Source] = {
        "folder": folder,
        "list": find_images(listing, seed=0, max_images=None),
        "shards": find_images(pattern, seed=0, max_images=None),
    }
    places: tuple[Literal["host", "device"], ...] = ("host", "device")
    return {
        (name, resize): (source, DataSection(batch_size=batch, workers=workers, resize=resize))
        for resize in places
        for name, source in sources.items()
    }


def _enlarged(folder: ImageFolder, target: Path, longest: int) -> ImageFolder:
    """The images as larger JPEG files: what a camera's photographs cost to decode."""
    target.mkdir()
    for index, path in enumerate(folder.files):
        with Image.open(path) as image:
            scale = longest / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image.convert("RGB").resize(size).save(target / f"{index:06}.jpg", quality=90)
    return ImageFolder.scan(target, seed=0, max_images=None)


def _table(
    folder: ImageFolder,
    rounds: dict[tuple[str, str], list[Speed]],
    options: argparse.Namespace,
    device: torch.device,
) -> str:
    medians = {
        key: Speed(*(statistics.median(column) for column in zip(*speeds, strict=True)))
        for key, speeds in rounds.items()
    }
    base = medians["folder", "host"]
    size = sum(path.stat().st_size for path in folder.files) / len(folder) / 1024
    lines = [
        f"{len(folder)} images of {size:.0f} KiB on average to {options.size} px, "
        f"{options.workers} threads, {device}, median of {options.rounds} rounds",
        "",
        "| source | resize | images/s | of folder, host | per core-second | loader_rate |",
        "|---|---|---|---|---|---|",
    ]
    for (source, resize), speed in medians.items():
        lines.append(
            f"| {source} | {resize} | {speed.taken:.0f} | {speed.taken / base.taken:.2f} | "
            f"{speed.per_core:.0f} | {speed.loader:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
