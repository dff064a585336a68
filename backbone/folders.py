"""Putting a folder in its place all at once."""

import os
import shutil
import tempfile
from pathlib import Path


def make_readable(folder: Path) -> None:
    """What temporary files and safetensors leave is for the owner alone; servers run as others."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def sync(folder: Path) -> None:
    """Flush files before the rename, so that a crash cannot leave a complete-looking empty one."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place; what stood there survives a failure."""
    if not folder.exists():
        temporary.rename(folder)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(retired / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        (retired / folder.name).rename(folder)
        retired.rmdir()
        raise
    shutil.rmtree(retired)
