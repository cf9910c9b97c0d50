"""What a process knows about itself, and how it ends."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from megastruct.launch.environment import Process
from megastruct.launch.watchdog.judgement import Limits
from megastruct.launch.watchdog.messages import Heartbeat


class ThisRank:
    """The main thread writes here where it is; the thread of the watch reads it, and may end the process."""

    def __init__(self, process: Process, limits: Limits) -> None:
        self.process, self.limits = process, limits
        self.tick_seconds = min(1.0, limits.silence_seconds / 10)  # between two heartbeats
        self.step, self.arrivals = 0, 0
        self.failed = False
        self.goodbye: int | None = None
        self._ending: tuple[float, int] | None = None  # (when, exit code), after an error of another rank
        self._main_thread = threading.main_thread().ident

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            step=self.step,
            arrivals=self.arrivals,
            doing=place_of(self._main_thread),
            failed=self.failed,
            goodbye=self.goodbye,
        )

    @property
    def is_ending(self) -> bool:
        return self._ending is not None

    def end(self, message: str, code: int, speaks: bool = False) -> None:
        """End this process now, without waiting for anything, unless it has said goodbye.

        The first rank of each node prints the message; `speaks`: this one prints it, too.
        """
        if self.goodbye is not None:
            return
        if speaks or self.process.local_rank == 0:
            # The progress bar leaves its line open.
            print(f"\nerror: {message}\n    the same command goes on from the newest checkpoint", file=sys.stderr)
        _exit(code)

    def end_later(self, code: int) -> None:
        """Another rank has ended with an error: end with its exit code, after some time to report errors here."""
        self._ending = self._ending or (time.monotonic() + self.limits.grace_seconds, code)

    def end_if_due(self) -> None:
        if self._ending and time.monotonic() > self._ending[0] and self.goodbye is None:
            _exit(self._ending[1])


def own_name() -> str:
    """Process and host, for messages to users."""
    return _printable(f"process {os.getpid()} on {socket.gethostname()}")


def place_of(thread: int | None) -> str:
    """The place in the code where a thread of this process is."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "its end"
    return _printable(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether a collective failed or timed out. gloo raises plain RuntimeErrors, in many words."""
    if isinstance(error, dist.DistError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(Path(dist.__file__).parent)
    return isinstance(error, RuntimeError) and (inside or "gloo" in str(error))


def _printable(text: str) -> str:
    """Without the lone surrogates that stand for bytes of file names which are not UTF-8: no message can carry them."""
    return text.encode(errors="replace").decode()


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a collective would keep the process
