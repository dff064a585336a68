"""JPEG by torchvision: the pixels of Pillow, sooner, and without the interpreter's lock.

    frame = read_frame(data)                       # what the markers declare, or None
    if frame is not None and frame.is_plain:
        pixels = decode(data)                      # uint8 [3, H, W], or None: ask Pillow

torchvision and Pillow both carry libjpeg-turbo and agree to the bit. Pillow keeps the lock while
it copies pixels out, 30 ms for 12 megapixels, and the event loop waits that long. Pillow stays
the judge: a file that torchvision refuses is given to it, and its verdict counts.

Dimension key: H, W = height and width in pixels as stored.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torchvision  # registers torch.ops.image
from torch import Tensor

logger = logging.getLogger(__name__)

# The operators and not `torchvision.io.decode_jpeg`, which warns in every call since 0.29: the
# decoders are to move to torchcodec one day. Without them everything goes to Pillow.
IS_AVAILABLE: bool = hasattr(torch.ops.image, "decode_jpeg")
if not IS_AVAILABLE:
    logger.warning("torchvision %s has no JPEG decoder: Pillow's is used", torchvision.__version__)
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# Real encoders write a dozen scans at most. A scan that says "no change" takes 60 bytes and costs
# a pass over all coefficients: 32 MB of them would keep a thread busy for half an hour. libtiff
# draws the same line.
MAX_SCANS = 100
# Walking through segments holds the interpreter's lock; real files have a few dozen.
_MAX_SEGMENTS = 10_000

# Neither stuffing in compressed data nor the markers that nothing belongs to.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _ADOBE = 0xD8, 0xD9, 0xDA, 0xEE
_FRAME_STARTS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class JpegFrame(NamedTuple):
    """What the markers ahead of the first scan declare."""

    height: int  # px
    width: int  # px
    process: int  # 0 baseline, 1 extended, 2 progressive, 3 lossless, 9 and 10 arithmetic
    precision: int  # bits of a sample
    component_ids: tuple[int, ...]
    adobe_transform: int | None  # of an Adobe marker: 0 RGB or CMYK, 1 YCbCr, 2 YCCK

    @property
    def is_plain(self) -> bool:
        """Whether torchvision decodes it as Pillow does: 8 bit, Huffman coded, grey or colour."""
        return self.process <= 2 and self.precision == 8 and len(self.component_ids) in (1, 3)

    @property
    def is_baseline(self) -> bool:
        """Whether nvJPEG takes it for what libjpeg does: plain, not progressive, grey or YCbCr."""
        is_ycbcr = self.component_ids == (1, 2, 3) and self.adobe_transform in (None, 1)
        return self.is_plain and self.process == 0 and (len(self.component_ids) == 1 or is_ycbcr)


def read_frame(data: bytes) -> JpegFrame | None:
    """Read the frame header as libjpeg would; None where there is none, or more than one."""
    frames: list[tuple[int, bytes]] = []
    adobe_transform = None
    for marker, start, end in _segments(data):
        if marker == _SOS:
            break
        if marker in _FRAME_STARTS:
            frames.append((marker - 0xC0, data[start:end]))
        elif marker == _ADOBE and data[start : start + 5] == b"Adobe" and end - start >= 12:
            adobe_transform = data[start + 11]
    else:
        return None
    if len(frames) != 1:
        return None
    process, body = frames[0]
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return JpegFrame(height, width, process, body[0], tuple(body[6::3]), adobe_transform)


def has_too_many_scans(data: bytes) -> bool:
    """Whether decoding would take more than `MAX_SCANS` passes over the image."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return False
    # What looks like a scan behind the end may be anything: phones append film clips.
    markers = [marker for marker, _, _ in _segments(data)]
    return len(markers) == _MAX_SEGMENTS or markers.count(_SOS) > MAX_SCANS


def decode(data: bytes) -> Tensor | None:
    """Decode a whole file; the orientation is not applied.

    Returns:
        uint8 [3, H, W] RGB, channels-last in memory; None where torchvision refuses the file.
    """
    try:
        pixels_3HW: Tensor = torch.ops.image.decode_jpeg(_as_tensor(data), _RGB)
    except RuntimeError:  # all that torchvision raises: damaged, unsupported, out of memory
        return None
    return pixels_3HW


def decode_batch(datas: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """`decode` of several files on `device`: by nvJPEG where that is a CUDA device.

    A file without an end is not tried, since nvJPEG would make up what is missing. One damaged
    file fails nvJPEG's whole batch: the members are then decoded one by one.

    Returns:
        uint8 [3, H, W] RGB on `device` per file; None where it is refused.
    """
    decoded: list[Tensor | None] = [None] * len(datas)
    whole = [index for index, data in enumerate(datas) if _has_end(data)]
    for index, pixels_3HW in zip(whole, _decode([datas[i] for i in whole], device), strict=True):
        decoded[index] = pixels_3HW
    return decoded


def _decode(datas: Sequence[bytes], device: torch.device) -> Sequence[Tensor | None]:
    if not datas:
        return []
    if device.type != "cuda":
        return [decode(data) for data in datas]
    try:
        pixels: list[Tensor] = torch.ops.image.decode_jpegs_cuda(
            [_as_tensor(data) for data in datas], _RGB, device
        )
    except RuntimeError as error:
        if len(datas) > 1:
            return [pixels_3HW for data in datas for pixels_3HW in _decode([data], device)]
        logger.warning("nvJPEG refused a file of %d bytes: %s", len(datas[0]), str(error)[:200])
        return [None]
    return pixels


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch wants writable memory


def _has_end(data: bytes) -> bool:
    return data.endswith(b"\xff\xd9") or any(marker == _EOI for marker, _, _ in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the contents of every segment, as libjpeg walks through them."""
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        marker, start = data[found.end() - 1], found.end()
        if marker == _EOI:
            yield marker, start, start
            return
        length = int.from_bytes(data[start : start + 2], "big")
        if marker == _SOI or length < 2 or start + length > len(data):
            return
        position = start + length
        yield marker, start + 2, position
