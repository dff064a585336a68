"""Folders that libraries write to, checked before they are loaded and fail in the midst of it."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from service.settings import SettingsError

# torch makes the first one when it is imported, Triton loads what it compiled from the second.
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def check_folders(environment: Mapping[str, str], *, must_execute: bool) -> None:
    """
    Args:
        environment: Names of the folders; where a name is not set the library has a place of its
            own.
        must_execute: Compiled code will be loaded from them.

    Raises:
        SettingsError: a folder cannot be written to, or what is in it not be executed.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise SettingsError(
            "there is no folder for temporary files; mount a writable /tmp, or set TMPDIR"
        ) from None
    for name in CACHE_VARIABLES:
        if environment.get(name):
            _check(name, Path(environment[name]), must_execute=must_execute)


def _check(name: str, folder: Path, *, must_execute: bool) -> None:
    advice = f"mount a volume there that user {os.getuid()} may write to, or set {name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if not must_execute:
                return
            file.write(b"\0")
            file.flush()
            try:
                mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
            except PermissionError:
                raise SettingsError(
                    f"{name} is {folder}, which is mounted so that nothing in it may be executed "
                    "(noexec, the default of Docker's tmpfs); kernels are compiled there: mount a "
                    "volume, or a tmpfs with the option exec"
                ) from None
    except OSError as error:
        raise SettingsError(
            f"{name} is {folder}, which cannot be written to ({error.strerror}); {advice}"
        ) from None
