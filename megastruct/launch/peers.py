"""What the watchdog needs of sockets, clocks and threads."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist


@dataclass
class Peer:
    """What rank 0 knows of a rank."""

    rank: int
    heard: float
    link: socket.socket | None = None
    name: str = ""  # host and process
    step: int = 0
    arrivals: int = 0  # at the begin of a step
    doing: str = ""  # where its main thread is
    goodbye: int | None = None  # the exit code it ends with; 0: all is well
    failed: bool = False  # a collective of it has failed
    unread: bytes = b""

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" ({self.name})" if self.name else "")

    def lines(self) -> list[str]:
        """Whole lines that have arrived. Raises ConnectionError where the process has closed the connection."""
        assert self.link is not None
        received = self.link.recv(65536)
        if not received:
            raise ConnectionError
        *lines, self.unread = (self.unread + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a stopped one takes nothing; one that is gone is seen when it is read
            if self.link is not None:
                self.link.send(line.encode() + b"\n")


@dataclass
class Clock:
    """Whether this process itself stood still since the last question (SIGSTOP, a sleeping machine)."""

    silence: float
    before: float = field(default_factory=time.monotonic)

    def stood_still(self) -> bool:
        gap, self.before = time.monotonic() - self.before, time.monotonic()
        return gap > self.silence / 2


def listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def silence_of(peer: Peer, seconds: float) -> str:
    return f"{peer} has been silent for {seconds:g} s: it is stopped, or its machine cannot be reached"


def is_of_a_collective(error: BaseException) -> bool:
    """Whether a collective failed or timed out. gloo raises plain RuntimeErrors, in many words."""
    if isinstance(error, dist.DistError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(Path(dist.__file__).parent)
    return isinstance(error, RuntimeError) and (inside or "gloo" in str(error))


def place_of(thread: int | None) -> str:
    """The place in the code that a thread of this process is at."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
