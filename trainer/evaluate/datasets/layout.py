"""How a published layout is recognised, and where in a folder it may begin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from trainer.evaluate.datasets.samples import DatasetError

T = TypeVar("T")


@dataclass(frozen=True)
class Layout(Generic[T]):
    """One way in which a data set is laid out.

    Attributes:
        about: One line for `--help`.
        marks: Sets of patterns; a folder that has all of one set has this layout.
        read: Lists the data set below its root.
        roots: Folders below the one given in which it may lie, tried in this order.
        is_recognised: Whether "auto" considers it.
    """

    about: str
    marks: tuple[tuple[str, ...], ...]
    read: Callable[[Path], T]
    roots: tuple[str, ...] = (".",)
    is_recognised: bool = True

    def find(self, folder: Path) -> Path | None:
        """The root of the data set, or None where the folder has not this layout."""
        for root in (folder / root for root in self.roots):
            if any(all(has(root, pattern) for pattern in patterns) for patterns in self.marks):
                return root
        return None

    def looked_for(self) -> str:
        """What `find` needs, in words."""
        sets = ", or ".join(" and ".join(patterns) for patterns in self.marks)
        return f"{sets} (here or in {', '.join(self.roots[1:])})" if self.roots[1:] else sets


def has(folder: Path, pattern: str) -> bool:
    """Whether something below a folder fits a pattern."""
    return any(True for _ in folder.glob(pattern))


def open_as(folder: Path, layout: str, layouts: Mapping[str, Layout[T]]) -> T:
    """Recognise and list the data set in a folder.

    Args:
        layout: A key of `layouts`, or "auto" for the one that fits. A folder with the layout
            "folder" is that, whatever else it has: its description was put there on purpose.

    Raises:
        DatasetError: No layout fits, more than one does, or files are missing.
    """
    if layout != "auto" and layout not in layouts:
        raise DatasetError(f"there is no layout {layout!r}; choose auto, {', '.join(layouts)}")
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}; give the one that holds the data set")
    tried = {
        name: candidate
        for name, candidate in layouts.items()
        if name == layout or (layout == "auto" and candidate.is_recognised)
    }
    roots = {name: candidate.find(folder) for name, candidate in tried.items()}
    fitting = {name: root for name, root in roots.items() if root is not None}
    if "folder" in fitting:
        fitting = {"folder": fitting["folder"]}
    if not fitting:
        if layout != "auto":
            raise DatasetError(
                f"{folder} is not laid out as {layout}; looked for {tried[layout].looked_for()}"
            )
        looked_for = "\n".join(f"  {name}: {tried[name].looked_for()}" for name in tried)
        raise DatasetError(f"{folder} has no layout that is known here; looked for\n{looked_for}")
    if len(fitting) > 1:
        raise DatasetError(
            f"{folder} fits the layouts {', '.join(fitting)}; name the one that is meant, as with "
            "--layout"
        )
    ((name, root),) = fitting.items()
    return tried[name].read(root)
