"""The process that tokenises the streams of a training rank ahead of it.

It is started by processes.py and speaks with it over a socket that it inherits:

    in:   first the sources and the streams with the places where they begin, then one stream name per wanted chunk
    out:  Reading (a shard was opened, or failed and will be tried again), Chunk, Failed

It does what is wanted, in the order in which it was wanted, and nothing else: how far it may be ahead, the parent says.
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
    stream: StreamName
    uri: str
    failure: str  # "" if there is none


class Chunk(NamedTuple):
    stream: StreamName
    documents: list[Placed]


class Failed(NamedTuple):
    stream: StreamName | None  # None: all
    error: UserError


def serve(connection: Connection, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]) -> None:
    """Answer one wish after the other until the other side is gone."""

    def watcher(name: StreamName) -> Callable[[str, str], None]:
        return lambda uri, failure: connection.send(Reading(name, uri, failure))

    streams = {
        name: tokenised_documents(sources[name[0]], name[1], start, watcher(name)) for name, start in starts.items()
    }
    wanted: deque[StreamName] = deque()
    failures: dict[StreamName, UserError] = {}  # a stream that failed has ended: later wishes get the same answer
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
        except UserError as error:  # the tokenizer's file is read again here
            connection.send(Failed(None, error))
            return
        serve(connection, sources, starts)
    except (EOFError, ConnectionError):
        pass  # the trainer has ended
