"""The interface for the training loop, and the watch thread of all ranks except rank 0."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch.distributed as dist

from megastruct.errors import EXIT_CODE_USER_ERROR, UserError
from megastruct.launch.environment import Process
from megastruct.launch.watchdog.centre import Centre
from megastruct.launch.watchdog.judgement import Limits, Peer, State, judge
from megastruct.launch.watchdog.messages import End, Hello, MalformedError
from megastruct.launch.watchdog.this_rank import ThisRank, is_of_a_collective, own_name
from megastruct.launch.watchdog.transport import Connection, connect, listen


class Watch:
    """The watch of this rank, a context manager to be entered after `join`. Collective.

    A single process is not watched.
    """

    def __init__(
        self,
        process: Process,
        silence_seconds: float,
        collective_seconds: float,
        last_words: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the limits.

        `silence_seconds`: time without a heartbeat after which a rank counts as stopped. `collective_seconds`: time
        that the others wait for a rank before it counts as hanging; the timeout of the process groups. `last_words` is
        called in a thread of every rank that is still there when the run ends for a rank that is lost or hangs; it
        must end soon, and raise nothing.
        """
        self.this_rank = ThisRank(process, Limits(silence_seconds, collective_seconds), last_words)
        self._connection: Connection | None = None  # to rank 0

    def arrived(self, step: int) -> None:
        """Note that the main thread begins the step after `step` finished ones."""
        self.this_rank.step = step
        self.this_rank.arrivals += 1  # last, for the thread that reads both

    def __enter__(self) -> Watch:
        this, limits = self.this_rank, self.this_rank.limits
        if this.process.world_size == 1:
            return self
        listener = listen() if this.process.rank == 0 else None
        meeting = [(listener.getsockname()[1], secrets.token_hex(16), own_name()) if listener else None]
        dist.broadcast_object_list(meeting)
        assert meeting[0] is not None
        port, word, name = meeting[0]
        if listener:
            Centre(this, listener, word)
        else:
            self._connection = connect(os.environ["MASTER_ADDR"], port, this.tick_seconds, limits.silence_seconds)
            self._connection.send(Hello(word, this.process.rank, own_name()))
            thread = threading.Thread(target=_report, args=(this, self._connection, name), name="watch", daemon=True)
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Say goodbye. After an error that another rank may have caused, first wait to learn which rank it was."""
        this = self.this_rank
        if this.process.world_size == 1:
            return
        if error is not None and is_of_a_collective(error):
            this.failed = True
            self._hurry()
            time.sleep(this.limits.grace_seconds + 2 * this.tick_seconds)
        this.goodbye = 0 if error is None else EXIT_CODE_USER_ERROR if isinstance(error, UserError) else 1
        self._hurry()

    def _hurry(self) -> None:
        """Send a heartbeat now. Rank 0 notes its own with the next tick, for which it waits if something failed."""
        if self._connection is not None:
            self._connection.send(self.this_rank.heartbeat())
        elif self.this_rank.goodbye:
            time.sleep(2 * self.this_rank.tick_seconds)


def _report(this: ThisRank, connection: Connection, name: str) -> None:
    """Send heartbeats to rank 0, whose name is `name`, judge it by its answers, and end when it says so."""
    centre, state, speaks = Peer(0, time.monotonic(), name), State(), this.process.rank == 1
    while True:
        connection.send(this.heartbeat())
        try:
            messages = connection.receive()
        except MalformedError:
            messages, centre = [], replace(centre, malformed=True)
        except OSError:
            messages, centre = [], replace(centre, disconnected=True)
        if messages:
            centre = replace(centre, heard_seconds=time.monotonic())
        for message in messages:
            if isinstance(message, End):
                if message.message:
                    this.end(message.message, message.code)
                else:
                    this.end_later(message.code)
        verdict, state = judge([centre], time.monotonic(), this.limits, state)
        if verdict and not this.is_ending:  # else rank 0 has ended after the same error
            this.end(verdict.message, verdict.code, speaks)
        this.end_if_due()
        if messages or verdict:
            time.sleep(this.tick_seconds)
