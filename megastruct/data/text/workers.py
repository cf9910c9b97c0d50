"""Tokenised documents from processes that work ahead of the trainer, a bounded number of chunks for each stream.

Every stream is a queue of its own, so that the order of what is read depends on nothing but the streams: with any
number of workers, and with none, the rows are the same.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

from megastruct.data.prefetch import join_soon
from megastruct.data.sources.retry import unreachable
from megastruct.data.text.stream import Placed, StreamCursor, TextSource, tokenised_documents
from megastruct.data.text.worker import Chunk, Reading, StreamName
from megastruct.errors import Problem, UserError

CHUNKS_AHEAD = 2  # of a stream, of 64 documents each: about 160,000 tokens of web pages
_LEAST_LIMIT_SECONDS = 60.0  # a chunk of long documents takes seconds, and so does the start of a process
_ROOT = Path(__file__).resolve().parents[3]
Chunks = Iterator[list[Placed]]


def open_chunks(
    owner: object, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor], num_workers: int
) -> dict[StreamName, Chunks]:
    """The tokenised documents of all streams, from `starts` on, by `num_workers` processes (0: a thread of this one).

    The processes end with `owner`, and with this process however it ends.
    """
    names = list(starts)
    if not num_workers or not names:
        return _threaded(owner, sources, starts)
    chunks: dict[StreamName, Chunks] = {}
    for index in range(min(num_workers, len(names))):
        own = names[index::num_workers]
        worker = _Worker(sources, {name: starts[name] for name in own})
        weakref.finalize(owner, worker.close)
        chunks |= {name: _FromWorker(worker, name, sources[name[0]].patience_seconds) for name in own}
    return chunks


def _limit_seconds(patience_seconds: float) -> float:
    """How long a reader may be silent: those that fail say so when their patience ends, this is for those that hang."""
    return max(1.5 * patience_seconds, _LEAST_LIMIT_SECONDS)


class _Worker:
    """One process, and the thread that takes in what it sends, so that it never waits for the trainer to listen."""

    def __init__(self, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]) -> None:
        self.queues: dict[StreamName, queue.SimpleQueue[list[Placed] | UserError]] = {
            name: queue.SimpleQueue() for name in starts
        }
        self.reading: dict[StreamName, Reading] = {}
        self.last_seconds = time.monotonic()  # when it was last heard of
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
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
                self.want(name)

    def want(self, name: StreamName) -> None:
        """Have one more chunk of a stream made."""
        self._send(name)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._thread.join(timeout=5)
        self._connection.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # if it is dead, the thread has said so
            self._connection.send(message)

    def _take_in(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self.last_seconds = time.monotonic()
                if isinstance(message, Chunk):
                    self.queues[message.stream].put(message.documents)
                elif isinstance(message, Reading):
                    self.reading[message.stream] = message
                elif message.stream is not None:
                    self.queues[message.stream].put(message.error)
                else:
                    self._fail(message.error)
        except Exception as error:  # whatever ends this thread must end the wait for it
            if not isinstance(error, (EOFError, OSError)):
                self.process.kill()
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            found = f"a process that tokenises {how}; perhaps the machine ran out of memory"
            suggestion = "start again, the run goes on from its checkpoint; or data.num_workers=0"
            self._fail(UserError(Problem("data.num_workers", found, suggestion)))
            if not isinstance(error, (EOFError, OSError)):
                raise

    def _fail(self, error: UserError) -> None:
        for waiting in self.queues.values():
            waiting.put(error)


class _FromWorker(Chunks):
    """One stream of a worker's."""

    def __init__(self, worker: _Worker, name: StreamName, patience_seconds: float) -> None:
        self._worker, self._name, self._patience_seconds = worker, name, patience_seconds
        self._error: UserError | None = None

    def __next__(self) -> list[Placed]:
        if self._error is None:
            item = self._wait()
            if not isinstance(item, UserError):
                self._worker.want(self._name)
                return item
            self._error = item
        raise self._error

    def _wait(self) -> list[Placed] | UserError:
        waiting_since = time.monotonic()
        while True:
            last_seconds = max(waiting_since, self._worker.last_seconds)
            left_seconds = last_seconds + _limit_seconds(self._patience_seconds) - time.monotonic()
            try:
                return self._worker.queues[self._name].get(timeout=max(0.0, left_seconds))
            except queue.Empty:
                if self._worker.last_seconds <= last_seconds:
                    return _silent(self._worker.reading, self._name, _limit_seconds(self._patience_seconds))


def _threaded(
    owner: object, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]
) -> dict[StreamName, Chunks]:
    pool = _Thread()
    weakref.finalize(owner, pool.close)
    reading: dict[StreamName, Reading] = {}

    def watcher(name: StreamName):
        return lambda uri, failure: reading.__setitem__(name, Reading(name, uri, failure))

    return {
        name: ReadAhead(
            tokenised_documents(sources[name[0]], name[1], start, watcher(name)),
            pool,
            name,
            reading,
            sources[name[0]].patience_seconds,
        )
        for name, start in starts.items()
    }


class _Thread:
    """Does one thing after the other; unlike those of an executor it does not keep a process that ends alive."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future, Chunks] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tokenise", daemon=True)
        self._thread.start()

    def take_next(self, chunks: Chunks) -> Future[list[Placed]]:
        future: Future[list[Placed]] = Future()
        self._work.put((future, chunks))
        return future

    def close(self) -> None:
        """Leave what is not begun undone."""
        self._closed = True
        self._work.put(None)
        join_soon(self._thread)

    def _run(self) -> None:
        while (work := self._work.get()) and not self._closed:
            future, chunks = work
            try:
                future.set_result(next(chunks))
            except Exception as error:
                future.set_exception(error)
            del work, future, chunks


class ReadAhead(Chunks):
    """Tokenises the next few documents in a thread while the current ones are used.

    SentencePiece lets go of Python's lock.
    """

    def __init__(
        self,
        chunks: Chunks,
        pool: _Thread,
        name: StreamName,
        reading: dict[StreamName, Reading],
        patience_seconds: float,
    ) -> None:
        self.chunks = chunks
        self._pool = pool
        self._name, self._reading, self._patience_seconds = name, reading, patience_seconds
        self._pending: Future[list[Placed]] | None = None

    def __next__(self) -> list[Placed]:
        pending = self._pending or self._pool.take_next(self.chunks)
        try:
            chunk = pending.result(timeout=_limit_seconds(self._patience_seconds))
        except TimeoutError:
            if pending.done():  # an error of that class from below
                raise
            raise _silent(self._reading, self._name, _limit_seconds(self._patience_seconds)) from None
        self._pending = self._pool.take_next(self.chunks)
        return chunk


def _silent(reading: dict[StreamName, Reading], name: StreamName, silent_seconds: float) -> UserError:
    """What is said of a source that neither answers nor fails."""
    if name not in reading:
        found = f"stream {name[1]} gave no document for {silent_seconds:g} s"
        return UserError(Problem("data.path", found, "raise data.patience_seconds, or start again"))
    return unreachable(reading[name].uri, silent_seconds, reading[name].failure or "it does not answer")
