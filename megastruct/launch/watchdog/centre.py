"""The thread of rank 0: receives from all ranks, judges, and tells all ranks when the run must end."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from dataclasses import replace

from megastruct.launch.watchdog.judgement import Peer, State, Verdict, judge
from megastruct.launch.watchdog.messages import Answer, End, Heartbeat, Hello, MalformedError, Message
from megastruct.launch.watchdog.this_rank import ThisRank, own_name
from megastruct.launch.watchdog.transport import Connection
from megastruct.processes import allow_open_files

FILES_BESIDE = 4096  # files that rank 0 may have open besides its connections
LAST_WORDS_SECONDS = 0.5  # time for a message to reach the other ranks


class Centre:
    """The watch over all ranks, in a thread of rank 0."""

    def __init__(self, this_rank: ThisRank, listener: socket.socket, word: str) -> None:
        """Start the thread. `word`: the secret word with which a connection must begin."""
        self.this_rank, self.listener, self.word = this_rank, listener, word
        allow_open_files(FILES_BESIDE + this_rank.process.world_size)
        now = time.monotonic()
        self.peers = [Peer(rank, now) for rank in range(this_rank.process.world_size)]
        self.peers[0] = Peer(0, now, own_name())
        self.connections: dict[int, Connection] = {}  # by rank
        self.state = State()
        self.verdict: Verdict | None = None
        listener.setblocking(False)  # a connection may be gone again before it is accepted
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._hear, name="watch", daemon=True).start()

    def _hear(self) -> None:
        next_tick = time.monotonic()
        while True:
            news = False
            for key, _ in self.selector.select(max(0.0, next_tick - time.monotonic())):
                if isinstance(key.fileobj, Connection):
                    news |= self._read(key.fileobj, key.data)
                else:
                    self._accept()
            is_tick = time.monotonic() >= next_tick
            if is_tick:
                next_tick = time.monotonic() + self.this_rank.tick_seconds
                self.peers[0] = self.peers[0].hear(self.this_rank.heartbeat(), time.monotonic())
                for connection in self.connections.values():
                    connection.send(Answer())
            if (news or is_tick) and self.verdict is None:  # a verdict is final: what follows it is its consequence
                self._judge()
            self.this_rank.end_if_due()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self.listener.accept()
            self.selector.register(Connection(link, wait_seconds=0.0), selectors.EVENT_READ)

    def _read(self, connection: Connection, rank: int | None) -> bool:
        """Receive from `rank`, None if it is not known yet. Returns whether to judge immediately."""
        try:
            for message in connection.receive():
                if rank is None:
                    rank = self._welcome(connection, message)
                elif isinstance(message, Heartbeat):
                    self.peers[rank] = self.peers[rank].hear(message, time.monotonic())
                else:
                    raise MalformedError(f"{message.kind} after the first message")
        except MalformedError:
            if rank is None:
                self._close(connection)
                return False
            self.peers[rank] = replace(self.peers[rank], malformed=True)  # left open, for the message that it must end
            return True
        except OSError:
            self._close(connection)
            if rank is None:
                return False
            del self.connections[rank]
            self.peers[rank] = replace(self.peers[rank], disconnected=True)
            return True
        return rank is not None and bool(self.peers[rank].said.goodbye)

    def _welcome(self, connection: Connection, hello: Message) -> int:
        """The rank of a new connection. Raises MalformedError if it does not begin with the word of the run."""
        if not isinstance(hello, Hello) or not secrets.compare_digest(hello.word.encode(), self.word.encode()):
            raise MalformedError("the first message does not have the word of the run")
        if not 0 < hello.rank < len(self.peers) or hello.rank in self.connections:
            raise MalformedError(f"rank {hello.rank} is connected already, or is not a rank of this run")
        self.peers[hello.rank] = Peer(hello.rank, time.monotonic(), hello.name)
        self.connections[hello.rank] = connection
        self.selector.modify(connection, selectors.EVENT_READ, hello.rank)
        return hello.rank

    def _close(self, connection: Connection) -> None:
        self.selector.unregister(connection)
        connection.close()

    def _judge(self) -> None:
        self.verdict, self.state = judge(self.peers, time.monotonic(), self.this_rank.limits, self.state)
        if self.verdict is None:
            return
        for connection in self.connections.values():
            connection.send(End(self.verdict.code, self.verdict.message))
        if self.verdict.message:
            self._let_it_arrive()
            self.this_rank.end(self.verdict.message, self.verdict.code)
        else:
            self.this_rank.end_later(self.verdict.code)

    def _let_it_arrive(self) -> None:
        """Keep reading for a moment: a connection that is closed with unread data would discard the message."""
        self.selector.unregister(self.listener)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            for key, _ in self.selector.select(LAST_WORDS_SECONDS / 10):
                assert isinstance(key.fileobj, Connection)
                try:
                    key.fileobj.receive()
                except MalformedError:
                    continue
                except OSError:
                    self.selector.unregister(key.fileobj)
