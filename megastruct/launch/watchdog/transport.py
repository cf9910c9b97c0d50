"""Connections that carry messages over sockets; the content of the messages does not matter here."""

from __future__ import annotations

import contextlib
import socket
import threading

from megastruct.launch.watchdog.messages import MalformedError, Message, decode, encode

MAX_LINE_BYTES = 65536  # far longer than any message; a connection from outside the run must not fill the memory
LISTEN_BACKLOG = 1024  # all ranks connect at once


class Connection:
    """Messages over one TCP connection. Any thread may send; one receives."""

    def __init__(self, link: socket.socket, wait_seconds: float) -> None:
        """`wait_seconds`: how long a call may wait for the network; 0: not at all."""
        self._link, self._unread, self._unsent, self._sending = link, b"", b"", threading.Lock()
        link.settimeout(wait_seconds)

    def fileno(self) -> int:
        """For selectors."""
        return self._link.fileno()

    def send(self, message: Message) -> None:
        """Send a message if the other side accepts it.

        A stopped process may accept nothing. The message is then dropped, since a newer one will follow; but a line
        that was begun is finished first. `receive` notices a process that is gone.
        """
        with self._sending, contextlib.suppress(OSError):
            if self._unsent:
                self._unsent = self._unsent[self._link.send(self._unsent) :]
            if not self._unsent:
                line = encode(message)
                self._unsent = line[self._link.send(line) :]

    def receive(self) -> list[Message]:
        """The complete messages that have arrived, possibly none.

        Raises ConnectionError if the other side has closed the connection, MalformedError if it has sent something that
        is not a message, and OSError for other network errors.
        """
        try:
            received = self._link.recv(MAX_LINE_BYTES)
        except (BlockingIOError, TimeoutError):
            return []
        if not received:
            raise ConnectionError("the other side has closed the connection")
        *lines, self._unread = (self._unread + received).split(b"\n")
        if len(self._unread) > MAX_LINE_BYTES:
            raise MalformedError(f"a line of more than {MAX_LINE_BYTES} bytes")
        return [decode(line) for line in lines]

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def listen() -> socket.socket:
    """A listening socket on all addresses of this machine, at a free port."""
    if socket.has_dualstack_ipv6():
        address = ("", 0)
        return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=LISTEN_BACKLOG)
    return socket.create_server(("", 0), backlog=LISTEN_BACKLOG)


def connect(host: str, port: int, wait_seconds: float, connect_seconds: float) -> Connection:
    """Connect to rank 0. Raises OSError if it is not reached within `connect_seconds`."""
    return Connection(socket.create_connection((host, port), timeout=connect_seconds), wait_seconds)
