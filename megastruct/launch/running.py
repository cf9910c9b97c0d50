"""Runs a launcher to its end, and passes requests to stop to the ranks, also to those that do not exist yet."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from megastruct.launch.deepspeed import RANK_MODULE
from megastruct.stops import KILL_SIGNALS, blocked, restore_handlers, set_handlers

REPEAT_SECONDS = 1.0  # signals within this time count as one request
ASK_SECONDS = 0.2  # between two looks for ranks that have not been asked to stop yet


def run_launcher(command: Sequence[str], environment: dict[str, str], stop_file: Path | None = None) -> int:
    """Run the launcher to its end and return its exit code.

    The first stop signal is passed to the ranks, which finish their step, save and exit; the launchers do not receive
    it. `stop_file` is made for ranks on machines that the launcher reached by ssh. A later SIGTERM, SIGINT or SIGQUIT
    kills all processes of this run on this machine immediately.
    """
    asked = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and time.monotonic() - asked > REPEAT_SECONDS and number in KILL_SIGNALS:
            _kill_children()
        elif not asked:
            asked = time.monotonic()
            name = signal.Signals(number).name
            request = "the ranks finish their step, save and exit; send it again to kill the run immediately"
            print(f"{name} received: {request}", file=sys.stderr, flush=True)
            # A thread: the launcher may still start ranks, while the main thread waits for it.
            threading.Thread(target=_ask_ranks, args=(number, process), name="stop", daemon=True).start()
            if stop_file is not None:
                stop_file.touch()

    with blocked():  # a signal that comes while the launcher is started waits for its handler
        before = set_handlers(stop)
        process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    finally:
        restore_handlers(before)
    return status if status >= 0 else 128 - status


def _ask_ranks(number: int, launcher: subprocess.Popen[bytes]) -> None:
    """Send the signal once to every rank on this machine, also to those that are started later."""
    asked: set[psutil.Process] = set()
    while launcher.returncode is None:
        for child in set(psutil.Process().children(recursive=True)) - asked:
            with suppress(psutil.Error):
                if child.cmdline()[1:4] == ["-u", "-m", RANK_MODULE]:
                    asked.add(child)
                    child.send_signal(number)
        time.sleep(ASK_SECONDS)


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
