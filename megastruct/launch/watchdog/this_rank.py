"""The state that a process reports about itself, and how it ends."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megastruct.launch.environment import Process
from megastruct.launch.watchdog.judgement import Limits
from megastruct.launch.watchdog.messages import Heartbeat


class ThisRank:
    """The main thread writes its progress here; the watch thread reads it and may end the process."""

    def __init__(self, process: Process, limits: Limits, last_words: Callable[[], None] = lambda: None) -> None:
        """`last_words` is called before the process ends for a rank that is lost or hangs; it raises nothing."""
        self.process, self.limits, self._last_words = process, limits, last_words
        self.tick_seconds = min(1.0, limits.silence_seconds / 10)  # between two heartbeats
        self.step, self.arrivals = 0, 0
        self.failed = False
        self.goodbye: int | None = None
        self._ending: tuple[float, int] | None = None  # (when, exit code), after an error of another rank
        self._main_thread = threading.main_thread().ident

    def heartbeat(self) -> Heartbeat:
        """The heartbeat of this moment."""
        return Heartbeat(
            step=self.step,
            arrivals=self.arrivals,
            doing=place_of(self._main_thread),
            failed=self.failed,
            goodbye=self.goodbye,
        )

    @property
    def is_ending(self) -> bool:
        """Whether `end_later` was called."""
        return self._ending is not None

    def end(self, message: str, code: int, speaks: bool = False) -> None:
        """Exit now with `code`, without waiting for anything, unless this process has said goodbye.

        The first rank of each node prints the message; with `speaks` this rank prints it, too.
        """
        if self.goodbye is not None:
            return
        if speaks or self.process.local_rank == 0:
            # The message begins on a new line, because the progress bar does not end its line.
            hint = "run the same command again to resume from the newest checkpoint"
            print(f"\nerror: {message}\n    {hint}", file=sys.stderr, flush=True)
        self._last_words()
        _exit(code)

    def end_later(self, code: int) -> None:
        """Exit with `code`, that of another rank's error, after some time in which this rank may report its own."""
        self._ending = self._ending or (time.monotonic() + self.limits.grace_seconds, code)

    def end_if_due(self) -> None:
        """Exit if the time after `end_later` is over."""
        if self._ending and time.monotonic() > self._ending[0] and self.goodbye is None:
            _exit(self._ending[1])


def own_name() -> str:
    """The process id and host of this process, for messages to users."""
    return _printable(f"process {os.getpid()} on {socket.gethostname()}")


def place_of(thread: int | None) -> str:
    """The file, line and function that a thread of this process is executing."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "its end"
    return _printable(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether the error is of a collective that failed or timed out; gloo raises plain RuntimeErrors of many texts."""
    if isinstance(error, dist.DistError):
        return True
    # Any of the calls, because a function that measures the collective may be the innermost one.
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = any(file.is_relative_to(Path(dist.__file__).parent) for file in files)
    return isinstance(error, RuntimeError) and (inside or "gloo" in str(error))


def _printable(text: str) -> str:
    """Replace lone surrogates (bytes of file names that are not UTF-8), which a message cannot contain."""
    return text.encode(errors="replace").decode()


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a collective would keep the process
