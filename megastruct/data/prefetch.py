"""Micro-batches that a thread reads while the trainer works, so that it does not wait for a file system."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator

import numpy as np

from megastruct.data.batch import Batch
from megastruct.data.reader import Reader

MICRO_BATCHES_AHEAD = 4
_LAST_WORK_SECONDS = 5.0

# A micro-batch with the reader's cursor behind it (None inside of a step), or what ended the reading.
_Read = tuple[Batch, np.ndarray | None] | BaseException


class Prefetched(Iterator[Batch]):
    """The micro-batches of `reader` in their order, at most `MICRO_BATCHES_AHEAD` of them read and not taken yet.

    What the reader raises comes out where its micro-batch would, and again at every call after. The thread ends when
    this object is collected.
    """

    def __init__(self, reader: Reader) -> None:
        self._cursor: np.ndarray | None = reader.cursor()
        self._error: BaseException | None = None
        self._read: queue.SimpleQueue[_Read] = queue.SimpleQueue()
        # A place for each micro-batch that may be read; a queue, because a semaphore is ten times slower.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(MICRO_BATCHES_AHEAD):
            self._room.put(None)
        closed = threading.Event()
        arguments = (reader, self._read, self._room, closed)
        thread = threading.Thread(target=_read_ahead, args=arguments, name="prefetch", daemon=True)
        weakref.finalize(self, _close, closed, self._room, thread)
        thread.start()

    def __next__(self) -> Batch:
        if self._error is None:
            read = self._read.get()
            if not isinstance(read, BaseException):
                batch, self._cursor = read
                self._room.put(None)
                return batch
            self._error = read
        raise self._error

    def cursor(self) -> np.ndarray:
        """The reader's behind the micro-batch that was taken last.

        Raises:
            RuntimeError: the current step has micro-batches left.
        """
        if self._cursor is None:
            raise RuntimeError("micro-batches of the current step are not consumed yet")
        return self._cursor


def _read_ahead(
    reader: Reader, read: queue.SimpleQueue[_Read], room: queue.SimpleQueue[None], closed: threading.Event
) -> None:
    """Knows the queue alone, so that the thread does not keep alive what ends it."""
    try:
        while room.get() is None and not closed.is_set():
            batch = next(reader)
            read.put((batch, reader.cursor() if reader.is_between_steps else None))
    except BaseException as error:  # whatever ends this thread must end the wait for it
        read.put(error)


def _close(closed: threading.Event, room: queue.SimpleQueue[None], thread: threading.Thread) -> None:
    closed.set()
    room.put(None)
    join_soon(thread)


def join_soon(thread: threading.Thread) -> None:
    """Wait for a thread that was told to end, a few seconds at most, in case it hangs.

    Not at all would not do: a library's code that calls Python aborts the process if the interpreter is on its way out.
    """
    if thread is not threading.current_thread():
        thread.join(_LAST_WORK_SECONDS)
