"""The name that was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'layers'?`, or the valid names when none is near."""
    names = {item.lower(): item for item in sorted(valid)}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return (
        f"did you mean {names[close[0]]!r}?" if close else f"valid are {', '.join(names.values())}"
    )
