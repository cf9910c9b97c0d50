"""Items that are produced before the trainer asks for them, so that it does not wait.

    ReadAhead   --- want --->   a maker: a thread of this process (`Maker`), or another process (text/processes.py)
                <-- made ----   one item per request, in order

Taking an item requests another one, so the number of items that are waiting to be taken is bounded.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, NamedTuple, TypeVar

_LAST_WORK_SECONDS = 5.0
T = TypeVar("T")


class Supply(NamedTuple, Generic[T]):
    """Connects a `ReadAhead` with its maker through queues, so that neither keeps the other alive."""

    want: Callable[[], None]  # requests one more item; returns immediately
    made: queue.SimpleQueue[T | BaseException]  # items, or the exception that ended them


class ReadAhead(Iterator[T]):
    """The items of a supply, `num_ahead` of them produced ahead.

    An error is raised in place of the item that failed, and again by every later call.
    """

    def __init__(self, supply: Supply[T], num_ahead: int) -> None:
        """`num_ahead`: 0 if the first items have been requested already."""
        self._want, self.made = supply
        self._not_begun = num_ahead
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Request the first items. The first `__next__` does this if it has not been done."""
        for _ in range(self._not_begun):
            self._want()
        self._not_begun = 0

    def __next__(self) -> T:
        if self._error is None:
            if self._not_begun:
                self.begin()
            item = self._wait()
            if not isinstance(item, BaseException):
                self._want()
                return item
            self._error = item
        raise self._error

    def _wait(self) -> T | BaseException:
        return self.made.get()


class Maker:
    """A thread that advances iterators, one item at a time, in the order of the requests.

    It ends when `owner` is collected; what has not begun by then is dropped. It knows the iterators alone, so that it
    does not keep its owner alive. Unlike an executor's threads it does not keep the process alive either.
    """

    def __init__(self, owner: object, name: str) -> None:
        # Queues, because a semaphore is ten times slower.
        self._wanted: queue.SimpleQueue[_Line | None] = queue.SimpleQueue()
        closed = threading.Event()
        thread = threading.Thread(target=_make, args=(self._wanted, closed), name=name, daemon=True)
        weakref.finalize(owner, _close, self._wanted, closed, thread)
        thread.start()

    def supply(self, items: Iterator[T]) -> Supply[T]:
        """A supply whose items are those of `items`."""
        line = _Line(items)
        return Supply(partial(self._wanted.put, line), line.made)


class _Line(Generic[T]):
    """One iterator of a maker, and the queue of its items."""

    def __init__(self, items: Iterator[T]) -> None:
        self.made: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._items = items
        self._error: BaseException | None = None

    def make(self) -> None:
        if self._error is None:
            try:
                self.made.put(next(self._items))
                return
            except BaseException as error:  # any end of the iterator must end the wait for its items
                self._error = error
        self.made.put(self._error)


def _make(wanted: queue.SimpleQueue[_Line | None], closed: threading.Event) -> None:
    while (line := wanted.get()) and not closed.is_set():
        line.make()
        del line  # else it would live until the next request


def _close(wanted: queue.SimpleQueue[_Line | None], closed: threading.Event, thread: threading.Thread) -> None:
    closed.set()
    wanted.put(None)
    join_soon(thread)


def join_soon(thread: threading.Thread) -> None:
    """Wait up to 5 s for a thread that was told to end.

    The wait is needed because library code that calls Python aborts the process while the interpreter shuts down. It is
    limited in case the thread hangs.
    """
    if thread is not threading.current_thread():
        thread.join(_LAST_WORK_SECONDS)
