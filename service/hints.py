"""The name that was probably meant."""

import difflib
from collections.abc import Iterable

# Of a name that a client sent: comparing one of megabytes takes seconds and a gigabyte.
_MAX_COMPARED = 100


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'layers'?`, or the valid names when none is near."""
    names = {item.lower(): item for item in sorted(valid)}
    close = difflib.get_close_matches(name[:_MAX_COMPARED].lower(), names, n=1)
    return (
        f"did you mean {names[close[0]]!r}?" if close else f"valid are {', '.join(names.values())}"
    )
