"""Less urgent threads: those that compute must not hold up the one that answers probes."""

import contextlib
import os
import threading

_NICENESS = 5


def lower_priority() -> None:
    """Let other threads of this process go before the calling one, and before those it starts.

    Linux alone has priorities per thread; elsewhere, and where the system refuses, all stay equal.
    """
    if not hasattr(os, "setpriority") or not hasattr(threading, "get_native_id"):
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
