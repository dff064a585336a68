"""Less urgent threads: those that compute must not hold up the one that answers probes."""

import contextlib
import os
import sys
import threading

_NICENESS = 5


def lower_priority() -> None:
    """Let other threads of this process go before the calling one, and before those it starts.

    Linux alone has priorities per thread; elsewhere all stay equal.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    # A sandbox may forbid it. Nothing is lost but the promptness of answers under load.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
