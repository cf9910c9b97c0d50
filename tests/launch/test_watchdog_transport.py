"""The thread of rank 0 over real sockets, and what is lost on none of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megastruct.launch.environment import Process
from megastruct.launch.watchdog.centre import Centre
from megastruct.launch.watchdog.judgement import Limits
from megastruct.launch.watchdog.messages import End, Heartbeat, Hello, MalformedError, Message, encode
from megastruct.launch.watchdog.this_rank import ThisRank
from megastruct.launch.watchdog.transport import MAX_LINE_BYTES, Connection, connect, listen

WORD = secrets.token_hex(16)
LIMITS = Limits(silence_seconds=20.0, patience_seconds=60.0, grace_seconds=0.5)
NAMES = {1: "process 7 on großer Rechner", 2: "进程 8 on 节点 2"}


class RankZero:
    """A process that is rank 0 of 3."""

    def __init__(self, log: Path) -> None:
        listener = listen()
        self.port, self.log = listener.getsockname()[1], log
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(listener,))
        self.process.start()
        listener.close()
        self.links = {rank: connect("127.0.0.1", self.port, 0.2, 5.0) for rank in NAMES}
        for rank, name in NAMES.items():
            self.links[rank].send(Hello(WORD, rank, name))
            self.links[rank].send(Heartbeat(3, 4, f"train.py:{rank} wait"))
            assert self.hears(rank).kind == "answer"

    def _run(self, listener: socket.socket) -> None:
        sys.stderr = self.log.open("w", buffering=1)
        Centre(ThisRank(Process(0, 0, 3), LIMITS), listener, WORD)
        time.sleep(60)
        os._exit(3)

    def hears(self, rank: int) -> Message:
        """The next message to a rank."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if received := self.links[rank].receive():
                return received[-1]
        raise TimeoutError

    def ends(self, rank: int) -> End:
        """What a rank is told to end with."""
        while not isinstance(message := self.hears(rank), End):
            assert message.kind == "answer"
        return message

    def code(self) -> int | None:
        self.process.join(20)
        return self.process.exitcode


@pytest.fixture
def zero(tmp_path: Path) -> Iterator[RankZero]:
    rank_zero = RankZero(tmp_path / "stderr")
    yield rank_zero
    rank_zero.process.kill()
    rank_zero.process.join()


def test_names_with_spaces_and_in_all_scripts_reach_every_rank_and_the_user(zero: RankZero) -> None:
    zero.links[1].send(Heartbeat(5, 6, "données à lire.py:3 読む"))
    zero.links[1].close()
    message = (
        f"rank 1 ({NAMES[1]}) is lost: its process has ended (last heard of at step 6, in données à lire.py:3 読む)"
    )
    assert zero.ends(2) == End(1, message)
    assert zero.code() == 1
    assert f"error: {message}\n" in zero.log.read_text()


def test_an_error_that_a_rank_says_itself_ends_the_others_with_its_code(zero: RankZero) -> None:
    """And no rank that ends because of it is called lost."""
    zero.links[1].send(Heartbeat(goodbye=2))
    zero.links[1].close()
    assert zero.ends(2) == End(2)
    zero.links[2].close()
    assert zero.code() == 2
    assert zero.log.read_text() == ""


def test_a_rank_that_sends_what_is_no_message_is_named(zero: RankZero) -> None:
    zero.links[2].send(Hello(WORD, 2, "again"))
    for rank in NAMES:
        assert zero.ends(rank).message.startswith(f"rank 2 ({NAMES[2]}) sent a message that cannot be read")
    assert zero.code() == 1


STRANGERS = {
    "another word": encode(Hello("0" * 32, 1, "me")),
    "a word of other letters": encode(Hello("ä" * 32, 1, "me")),
    "no word": encode(Heartbeat(goodbye=2)),
    "a rank that is connected": encode(Hello(WORD, 1, "me")),
    "rank 0": encode(Hello(WORD, 0, "me")),
    "a rank of a larger run": encode(Hello(WORD, 3, "me")),
    "a negative rank": json.dumps({"kind": "hello", "word": WORD, "rank": -1, "name": "me"}).encode() + b"\n",
    "the lines of old": f"{WORD} 1 me\n".encode(),
    "no end of a line": b"x" * (4 * MAX_LINE_BYTES),
    "zeros": b"\0\n" * 10,
    "an empty line": b"\n",
}


def test_strangers_are_closed_and_change_nothing(zero: RankZero) -> None:
    for name, text in STRANGERS.items():
        with socket.create_connection(("127.0.0.1", zero.port), timeout=10) as link:
            try:
                link.sendall(text + encode(Heartbeat(goodbye=2)))
                assert link.recv(100) == b"", name
            except ConnectionError:
                pass
    with socket.create_connection(("127.0.0.1", zero.port), timeout=10) as silent:
        for rank in NAMES:
            assert zero.hears(rank).kind == "answer"
        zero.links[1].send(Heartbeat(goodbye=0))
        zero.links[1].close()
        time.sleep(2 * 1.0)  # two ticks
        assert zero.hears(2).kind == "answer" and zero.process.is_alive()
        silent.sendall(b"x")


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


def test_a_process_that_stood_still_reads_whole_lines_when_it_goes_on() -> None:
    """The buffers of its connection are full, in the middle of a line; what did not fit is missing as a whole."""
    left, right = connected()
    sender, receiver = Connection(left, 0.0), Connection(right, 0.0)
    sent, steps = 3000, [0]
    for step in range(1, sent):
        sender.send(Heartbeat(step, doing="x" * 5000))
    while steps[-1] < 3000:  # it goes on
        while received := receiver.receive():
            steps += [message.step for message in received if isinstance(message, Heartbeat)]
        sender.send(Heartbeat(sent, doing="x" * 5000))
        sent += 1
    assert steps[:2] == [0, 1] and steps == sorted(set(steps))
    assert len(steps) < 3000, "the buffers took all of it"


def test_whole_lines_before_the_end_of_a_connection_are_read() -> None:
    left, right = connected()
    left.sendall(encode(Heartbeat(goodbye=0)) + encode(Heartbeat())[:10])
    left.close()
    receiver = Connection(right, 0.0)
    assert receiver.receive() == [Heartbeat(goodbye=0)]
    with pytest.raises(ConnectionError):
        receiver.receive()


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    left, right = connected()
    left.setblocking(False)
    receiver, received = Connection(right, 0.0), 0
    with pytest.raises(MalformedError):
        while received < 10 * MAX_LINE_BYTES:
            received += left.send(b"x" * 1000)
            receiver.receive()
    assert received < 2 * MAX_LINE_BYTES
