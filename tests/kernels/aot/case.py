"""What the ahead-of-time compile is given."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """A launch to compile.

    Attributes:
        name: Operation and variant, as the resource table has it.
        launch: Calls a launcher with fake CUDA tensors that it makes itself.
        has_mma: Every kernel that it launches must multiply on matrix units.
    """

    name: str
    launch: Callable[[], object]
    has_mma: bool
