"""What the HTML pages of the trainer share: they load nothing, so pictures are inside of them."""

import base64
import io
import math
from typing import Literal

from PIL import Image


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in a range that is not empty."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((f * power for f in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def data_uri(picture: Image.Image, format: Literal["JPEG", "PNG"], *, quality: int = 82) -> str:
    """A picture as a data URI; `quality` is of JPEG."""
    buffer = io.BytesIO()
    if format == "JPEG":
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
