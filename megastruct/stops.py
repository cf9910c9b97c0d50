"""The signals that ask a run to stop, and how a command takes them from its first moment on. Without torch.

On a signal, the launchers between the user's command and its ranks would kill the ranks or exit without them. So
launchers are started with the stop signals blocked (`blocked`), and each rank unblocks them for itself (`StopRequest`
in `launch/signals.py`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megastruct.errors import EXIT_CODE_START_AGAIN

# Terminals send INT and QUIT (Ctrl-C, Ctrl-\), closed connections HUP, schedulers TERM, USR1, USR2 and XCPU.
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
KILL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)  # for a run that has been asked to stop before
STOP_FILE = "stop"  # in the run folder

Handler = Callable[[int, FrameType | None], object]


def set_handlers(handler: Handler) -> dict[int, object]:
    """Let `handler` take the stop signals; returns what took them before, for `restore_handlers`.

    A SIGHUP that the caller ignores stays ignored: under nohup a run goes on when its connection is closed.
    """
    taken = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not _is_ignored(number)]
    return {number: signal.signal(number, handler) for number in taken}


def restore_handlers(before: dict[int, object]) -> None:
    """Undo `set_handlers`."""
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def blocked() -> Iterator[None]:
    """Block the stop signals in processes that are started inside, and in their children, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ends_when_asked() -> Iterator[None]:
    """Inside, a stop signal ends this process with one line and the exit code that asks for a new start.

    For the time in which no rank exists: there is nothing to save.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        print(f"stopped by {name} before the run was started", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE_START_AGAIN)

    before = set_handlers(end)
    try:
        yield
    finally:
        restore_handlers(before)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
