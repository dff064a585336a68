"""Images to send: photographs, each request with bytes of its own, and odd ones.

A comment in the file makes the same picture a new content: no cache knows it, and it costs the
client a copy of some kilobytes instead of an encoding.
"""

import io
import itertools
import os
import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.load import Job

_SUFFIXES = (".jpg", ".jpeg")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER_END = 33  # signature and IHDR
ASPECTS = (0.5, 0.75, 1.0, 4 / 3, 2.0)  # width / height
MIXED_SIDES = (224, 336, 518, 768)  # px, longest side


def read_images(folder: Path, num_images: int) -> list[bytes]:
    """Bytes of different JPEG files, the same ones each time.

    Raises:
        SystemExit: the folder has too few.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(files) < num_images:
        raise SystemExit(f"{folder} has {len(files)} JPEG files; --num-images is {num_images}")
    step = len(files) // num_images  # from the whole folder, not its first source alone
    return [path.read_bytes() for path in files[::step][:num_images]]


def with_comment(data: bytes, comment: bytes) -> bytes:
    """The same picture with a comment in its file.

    Args:
        data: A JPEG or PNG file.
        comment: At most 65533 bytes of Latin-1 text.
    """
    if data.startswith(b"\xff\xd8"):
        start = 2
        if data[2:4] == b"\xff\xe0":  # JFIF wants its segment first
            start = 4 + int.from_bytes(data[4:6], "big")
        segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
        return data[:start] + segment + data[start:]
    assert data.startswith(_PNG), "a JPEG or PNG file"
    return data[:_PNG_HEADER_END] + _chunk(b"tEXt", b"Comment\0" + comment) + data[_PNG_HEADER_END:]


class Traffic:
    """An endless stream of requests; `hit_rate` of them repeat an image of a small hot set.

    Send `warm_up` first: it puts the hot set into the cache.
    """

    def __init__(
        self,
        images: Sequence[bytes],
        *,
        sides: Sequence[int | tuple[int, int]] = (),
        hit_rate: float = 0.0,
        hot: int = 24,
        query: str = "",
        headers: str = "",
        seed: int = 0,
    ) -> None:
        """
        Args:
            sides: Sizes to ask for, drawn evenly: longest side, or (height, width), in px.
            hot: Images that are repeated.
            query: More options, as `&dtype=float32`.
        """
        self._images = images
        self._sizes = [_size(side) for side in sides] or [("", "")]
        self._hit_rate = hit_rate
        self._query = query
        self._headers = headers
        self._random = random.Random(seed)
        self._run = os.urandom(8).hex()  # contents differ from those of every earlier run
        self._numbers = itertools.count()
        self.warm_up = [self.fresh() for _ in range(hot)] if hit_rate else []

    def __iter__(self) -> Iterator[Job]:
        while True:
            yield self.draw()

    def draw(self) -> Job:
        """The next request."""
        if self._hit_rate and self._random.random() < self._hit_rate:
            return self._random.choice(self.warm_up)
        return self.fresh()

    def fresh(self) -> Job:
        """A request with an image that was not sent before."""
        number = next(self._numbers)
        image = self._images[number % len(self._images)]
        size, kind = self._random.choice(self._sizes)
        query = "?" + "&".join(part for part in (size, self._query.lstrip("&")) if part)
        body = with_comment(image, f"{self._run} {number}".encode())
        return Job(body, query.rstrip("?"), kind, headers=self._headers)


def in_aspects(images: Iterable[bytes]) -> list[bytes]:
    """Each image cut to one of `ASPECTS`, in turn."""
    cut = []
    for data, aspect in zip(images, itertools.cycle(ASPECTS), strict=False):
        with Image.open(io.BytesIO(data)) as image:
            width = min(image.width, int(image.height * aspect))
            height = min(image.height, int(width / aspect))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            part = image.convert("RGB").crop((left, top, left + width, top + height))
        cut.append(_saved(part, "JPEG", quality=90))
    return cut


def kinds_of(data: bytes) -> dict[str, bytes]:
    """One photograph in the forms that photographs come in."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    grey_16 = Image.frombytes(
        "I;16", image.size, b"".join(bytes((7, value)) for value in image.convert("L").tobytes())
    )
    return {
        "jpeg": data,
        "jpeg progressive": _saved(image, "JPEG", progressive=True, quality=90),
        "jpeg grey": _saved(image.convert("L"), "JPEG"),
        "jpeg CMYK": _saved(image.convert("CMYK"), "JPEG"),
        "jpeg EXIF-rotated": _saved(image, "JPEG", exif=turned),
        "png 16 bit": _saved(grey_16, "PNG"),
        "png RGBA": _saved(_faded(image), "PNG"),
        "webp": _saved(image, "WEBP"),
    }


def corrupt(data: bytes) -> bytes:
    """The first half of an image file."""
    return data[: len(data) // 2]


def bomb() -> bytes:
    """A small PNG file that declares 2.5 billion pixels."""
    side = 50_000
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000), 9)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _faded(image: Image.Image) -> Image.Image:
    alpha = Image.linear_gradient("L").resize(image.size)
    faded = image.convert("RGBA")
    faded.putalpha(alpha)
    return faded


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def _size(side: int | tuple[int, int]) -> tuple[str, str]:
    if isinstance(side, int):
        return f"size={side}", f"{side} px"
    return f"size={side[0]},{side[1]}", f"{side[0]}x{side[1]} px"
