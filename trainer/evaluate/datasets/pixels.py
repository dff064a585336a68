"""Label and depth files as arrays, exactly as stored, with errors that name the file."""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.evaluate.datasets.samples import DatasetError

# What Pillow raises over damaged files; EOFError and the like come out of its parsers.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is gone, or a link to a file that is; open the data set again"
        ) from error
    except _DAMAGE as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); it is damaged or incomplete: copy or unpack it again"
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels as stored; reads no pixels."""
    with _naming(path), Image.open(path) as opened:
        return opened.height, opened.width


def read_png(path: Path, *, modes: tuple[str, ...], wanted: str) -> npt.NDArray[np.generic]:
    """The values of a PNG file of one of Pillow's `modes`, `[H, W]`.

    Args:
        wanted: What the file should be, for the error: "a label map is ...".
    """
    with _naming(path), Image.open(path) as opened:
        if opened.format != "PNG":
            raise DatasetError(f"{path} is a {opened.format} file, not PNG; {wanted}")
        if opened.mode not in modes:
            raise DatasetError(f"{path} has mode {_describe(opened.mode)}; {wanted}")
        if any(tile.args in ("L;2", "L;4") for tile in opened.tile):
            # Pillow spreads such values over 0 to 255, and a class would be read as another.
            raise DatasetError(f"{path} has 2 or 4 bits per grey pixel; {wanted}")
        return np.array(opened)


def read_npy(path: Path) -> npt.NDArray[np.generic]:
    """A NumPy array from a file that holds no Python objects."""
    with _naming(path):
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise DatasetError(f"{path} is an archive of arrays, not one array; use numpy.save")
        return array


def _describe(mode: str) -> str:
    kinds = {
        "RGB": "colours",
        "RGBA": "colours and opacity",
        "LA": "grey and opacity",
        "1": "1 bit per pixel",
        "L": "8 bits per pixel",
        "P": "8 bits per pixel and a palette",
        "I;16": "16 bits per pixel",
        "I": "16 bits per pixel",
    }
    return f"{mode} ({kinds[mode]})" if mode in kinds else mode
