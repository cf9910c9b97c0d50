"""Asked to stop: by a signal to any process, or by a file in the run folder. All ranks stop after the same step.

The launchers between the command that was started and its ranks would end the ranks at a signal, or end alone: they
are started with these signals blocked (`blocked`), and a rank unblocks them for itself (`StopRequest`).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "stop"  # in the run folder
FILE_INTERVAL_SECONDS = 1.0


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started inside keep the stop signals for later, and theirs do, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether this run has been asked to stop. One for each rank, made early: a signal before it ends the process."""

    def __init__(self) -> None:
        self.reason = ""  # of this rank
        self.file: Path | None = None
        self._looked = 0.0
        self._answer: tuple[torch.Tensor, dist.Work] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def watch(self, file: Path) -> None:
        """Look for this file, too, on one rank; what was left there before this process began is removed."""
        self.file = file
        with suppress(FileNotFoundError):
            if file.stat().st_mtime < psutil.Process().create_time():  # a later one asks this run, while it starts
                file.unlink(missing_ok=True)

    def ask(self, device: torch.device) -> None:
        """Send this rank's answer to all, before a step; it travels while the step runs. Collective."""
        self._look()
        tensor = torch.tensor(int(bool(self.reason)), dtype=torch.int32, device=device)
        self._answer = tensor, dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank had been asked when `ask` was called; the same on all."""
        if self._answer is None:
            return False
        (tensor, work), self._answer = self._answer, None
        work.wait()
        return bool(tensor)

    def say(self, step: int, folder: Path) -> None:
        """What happened, for the user; the stop file has done its work."""
        if self.file:
            self.file.unlink(missing_ok=True)
        reason = self.reason or "a signal to another rank"
        print(
            f"stopped by {reason} after step {step}, which is saved in {folder}; the same command resumes",
            file=sys.stderr,
            flush=True,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _look(self) -> None:
        """A shared file system is asked seldom."""
        if self.file and not self.reason and time.monotonic() - self._looked > FILE_INTERVAL_SECONDS:
            self._looked = time.monotonic()
            with suppress(OSError):
                if self.file.exists():
                    self.reason = f"the file {self.file}"
