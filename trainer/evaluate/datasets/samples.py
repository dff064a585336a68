"""What all readers of data sets share: a sample, its error, and the number for "not scored"."""

from dataclasses import dataclass
from pathlib import Path

from trainer.evaluate.errors import EvaluationError

# The class number of pixels that are not scored; there are at most this many classes.
IGNORE = 255


class DatasetError(EvaluationError):
    """A folder, a list or a file that does not have the layout of its data set."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known of each of its pixels.

    Attributes:
        name: Unique within its part.
        image: A photograph.
        target: Its label map or its depth map.
    """

    name: str
    image: Path
    target: Path
