"""Sockets: connections that carry messages. What the messages say is nothing to this file."""

from __future__ import annotations

import contextlib
import socket
import threading

from megastruct.launch.watchdog.messages import MalformedError, Message, decode, encode

MAX_LINE_BYTES = 65536  # far above any message; what a stranger sends must not fill the memory
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
        """Send, if the other side takes it. A stopped process may take nothing: then the message is dropped, since a
        newer one will follow, but a line that was begun is finished first. A process that is gone is noticed by
        `receive`."""
        with self._sending, contextlib.suppress(OSError):
            if self._unsent:
                self._unsent = self._unsent[self._link.send(self._unsent) :]
            if not self._unsent:
                line = encode(message)
                self._unsent = line[self._link.send(line) :]

    def receive(self) -> list[Message]:
        """The whole messages that have arrived, perhaps none.

        Raises ConnectionError where the other side has closed the connection, MalformedError where it has sent what is
        no message, and OSError for other faults of the network.
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
        self._link.close()


def listen() -> socket.socket:
    """A listener on all addresses of this machine, at a free port."""
    if socket.has_dualstack_ipv6():
        address = ("", 0)
        return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=LISTEN_BACKLOG)
    return socket.create_server(("", 0), backlog=LISTEN_BACKLOG)


def connect(host: str, port: int, wait_seconds: float, connect_seconds: float) -> Connection:
    """To rank 0. Raises OSError where it is not reached within `connect_seconds`."""
    return Connection(socket.create_connection((host, port), timeout=connect_seconds), wait_seconds)
