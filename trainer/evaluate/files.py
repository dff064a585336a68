"""Writing a file all at once: whoever reads it sees the old one or the new one."""

import os
import tempfile
from pathlib import Path

PART_PREFIX = ".part-"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in the place of what is there; its folder is made if need be.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PART_PREFIX, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name without content
            temporary.chmod(0o644)  # a temporary file is for its owner alone
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
