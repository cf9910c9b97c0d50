"""What a process asks of the system about itself: an end together with its parent, and enough open files."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time

_SECONDS_BETWEEN_LOOKS = 0.1  # short of what a next run takes to start: it must not find the processes of the last one


def end_with_parent(parent: int) -> None:
    """From now on, end this process at once when its parent process, of the id `parent`, has ended.

    A parent that was killed stops nobody itself. What the main thread does, or hangs in, does not delay it.
    """
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # from its end on it is another one's
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files to `wanted`, or as far as the system allows; returns the limit.

    1,024 is usual, and a process may raise it up to its hard limit. Never lowers it.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    target = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if target > limit:
        with contextlib.suppress(OSError, ValueError):  # some systems have a further bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, most))
            limit = target
    return limit
