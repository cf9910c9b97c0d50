"""The process that tokenises the streams of a training rank ahead of it.

processes.py starts the process and communicates with it over an inherited socket:

    in:   first the sources, and the streams with their starting places; then one stream name per requested chunk
    out:  Reading (a shard was opened, or failed and will be retried), Chunk, Failed

The process serves the requests in order; the parent limits how far it reads ahead.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from megastruct.data.text.stream import Placed, StreamCursor, TextSource, tokenised_documents
from megastruct.errors import UserError
from megastruct.processes import end_with_parent

StreamName = tuple[int, int]  # source, stream of that source


class Reading(NamedTuple):
    """A stream has opened a shard, or reading it failed and will be retried."""

    stream: StreamName
    uri: str
    failure: str  # the error; "" if there is none


class Chunk(NamedTuple):
    """The next tokenised documents of a stream."""

    stream: StreamName
    documents: list[Placed]


class Failed(NamedTuple):
    """A stream has ended with an error."""

    stream: StreamName | None  # None: all streams
    error: UserError


def serve(connection: Connection, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]) -> None:
    """Serve one request after the other until the trainer closes the connection, which raises EOFError."""

    def watcher(name: StreamName) -> Callable[[str, str], None]:
        return lambda uri, failure: connection.send(Reading(name, uri, failure))

    streams = {
        name: tokenised_documents(sources[name[0]], name[1], start, watcher(name)) for name, start in starts.items()
    }
    wanted: deque[StreamName] = deque()
    failures: dict[StreamName, UserError] = {}  # a failed stream has ended; later requests get the same error
    while True:
        while not wanted or connection.poll():
            wanted.append(connection.recv())
        name = wanted.popleft()
        try:
            if name not in failures:
                connection.send(Chunk(name, next(streams[name])))
        except UserError as error:
            failures[name] = error
        if name in failures:
            connection.send(Failed(name, failures[name]))


def main(descriptor: int, trainer: int) -> None:
    """The whole life of the process; `descriptor`: of the socket; `trainer`: the id of the process that started it."""
    # Ctrl-C reaches all processes of a terminal, other signals all of a job: the trainer finishes its step, with data.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(trainer)  # also while a source hangs
    connection = Connection(descriptor)
    try:
        try:
            sources, starts = connection.recv()
        except UserError as error:  # unpickling reads the tokenizer's file again
            connection.send(Failed(None, error))
            return
        serve(connection, sources, starts)
    except (EOFError, ConnectionError):
        pass  # the trainer has ended
