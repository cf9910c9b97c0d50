"""Requests to stop: a signal to any process of the run, or a file in the run folder. All ranks stop after the same
step."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megastruct.stops import STOP_SIGNALS, set_handlers

FILE_INTERVAL_SECONDS = 1.0


class StopRequest:
    """Whether this run has been asked to stop.

    Each rank makes one object, early: a signal that arrives before ends the process.
    """

    def __init__(self) -> None:
        self.reason = ""  # of this rank
        self.file: Path | None = None
        self._looked = 0.0
        self._answer: tuple[torch.Tensor, dist.Work] | None = None
        set_handlers(self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def watch(self, file: Path) -> None:
        """Let this rank look for a stop file as well; a file that is older than this process is removed."""
        self.file = file
        with suppress(FileNotFoundError):
            if file.stat().st_mtime < psutil.Process().create_time():  # a newer one is meant for this run
                file.unlink(missing_ok=True)

    def ask(self, device: torch.device) -> None:
        """Tell all ranks, before a step, whether this one was asked to stop; it overlaps with the step. Collective."""
        self._look()
        tensor = torch.tensor(int(bool(self.reason)), dtype=torch.int32, device=device)
        self._answer = tensor, dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop when `ask` was called; the same on all ranks."""
        if self._answer is None:
            return False
        (tensor, work), self._answer = self._answer, None
        work.wait()
        return bool(tensor)

    def say(self, step: int, folder: Path) -> None:
        """Print for the user why the run stopped, and remove the stop file."""
        if self.file:
            self.file.unlink(missing_ok=True)
        reason = self.reason or "a signal to another rank"
        print(
            f"stopped by {reason} after step {step}, which is saved in {folder}; run the same command again to resume",
            file=sys.stderr,
            flush=True,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _look(self) -> None:
        """Look for the stop file, at most once a second, because the file system may be shared."""
        if self.file and not self.reason and time.monotonic() - self._looked > FILE_INTERVAL_SECONDS:
            self._looked = time.monotonic()
            with suppress(OSError):
                if self.file.exists():
                    self.reason = f"the file {self.file}"
