"""The trainer's side of a process that tokenises ahead of it; worker.py runs in that process."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection

from megastruct.data.read_ahead import Supply
from megastruct.data.text.chunks import Signs
from megastruct.data.text.stream import Placed, StreamCursor, TextSource
from megastruct.data.text.worker import Chunk, Failed, Reading, StreamName
from megastruct.errors import Problem, UserError
from megastruct.import_path import import_variables

CHUNKS_AHEAD = 2  # per stream, of 64 documents each: about 160,000 tokens of web pages


class TextProcess(Signs):
    """One process, and a thread that receives what it sends, so that it never waits for the trainer.

    The process starts with `CHUNKS_AHEAD` chunks of each stream.
    """

    def __init__(self, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]) -> None:
        super().__init__()
        self._made: dict[StreamName, queue.SimpleQueue[list[Placed] | BaseException]] = {
            name: queue.SimpleQueue() for name in starts
        }
        ours, theirs = socket.socketpair()
        environment = os.environ | import_variables()
        # Not multiprocessing: it would import the trainer's main module, and with it torch, into every worker.
        call = f"main({theirs.fileno()}, {os.getpid()})"
        command = [sys.executable, "-c", f"from megastruct.data.text.worker import main; {call}"]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._thread = threading.Thread(target=self._take_in, name="text-worker", daemon=True)
        self._thread.start()
        self._send((sources, starts))
        for _ in range(CHUNKS_AHEAD):
            for name in starts:
                self._send(name)

    def supply(self, name: StreamName) -> Supply[list[Placed]]:
        """A supply of the chunks of a stream."""
        return Supply(partial(self._send, name), self._made[name])

    def close(self) -> None:
        """Kill the process and wait for its end."""
        self.process.kill()
        self.process.wait()
        self._thread.join(timeout=5)
        self._connection.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # if the process is dead, the thread reports it
            self._connection.send(message)

    def _take_in(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self.heard(message if isinstance(message, Reading) else None)
                if isinstance(message, Chunk):
                    self._made[message.stream].put(message.documents)
                elif isinstance(message, Failed):
                    self._fail(message.error, self._made if message.stream is None else [message.stream])
        except Exception as error:  # any end of this thread must end the wait for chunks
            if not isinstance(error, (EOFError, OSError)):
                self.process.kill()
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            found = f"a tokenising process {how}; the machine may have run out of memory"
            suggestion = "start again to resume from the last checkpoint, or set data.num_workers=0"
            self._fail(UserError(Problem("data.num_workers", found, suggestion)), self._made)
            if not isinstance(error, (EOFError, OSError)):
                raise

    def _fail(self, error: UserError, streams: Iterable[StreamName]) -> None:
        for name in streams:
            self._made[name].put(error)
