"""What a process asks of the system about itself: an end together with its parent, and enough open files.

Imports nothing heavy, so that a rank can watch its launcher before it imports torch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable

LAUNCHER_VARIABLE = "MEGASTRUCT_LAUNCHER"  # the process id of the launcher, for its ranks
_SECONDS_BETWEEN_LOOKS = 0.1  # short of what a next run takes to start: it must not find the processes of the last one


def end_with_parent(parent: int) -> None:
    """From now on, end this process at once when its parent process, of the id `parent`, has ended.

    A parent that was killed stops nobody itself. What the main thread does, or hangs in, does not delay it.
    """
    when_parent_ends(parent, lambda: os._exit(1))


def end_with_launcher() -> None:
    """For a rank: end with the launcher that started it, however that is ended; a rank without one goes on.

    deepspeed's and torch's launchers are known by what they tell each rank about its node.
    """
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is not None:
        end_with_parent(int(launcher))
    elif "LOCAL_SIZE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def when_parent_ends(parent: int, action: Callable[[], object]) -> None:
    """Call `action` in a thread when the parent process, of the id `parent`, has ended."""
    threading.Thread(target=_watch, args=(parent, action), name="parent", daemon=True).start()


def _watch(parent: int, action: Callable[[], object]) -> None:
    while os.getppid() == parent:  # from its end on it is another one's
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    action()


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
