"""No rank waits for ever for another one: a rank that is gone, silent or late ends the run, and is named.

Every rank keeps one TCP connection to rank 0, from a thread of its own, and sends a heartbeat over it; rank 0 answers.
What the main thread does (compile, save, evaluate) does not delay a heartbeat, so that it shows that the process lives:
- a connection that closes without a goodbye is a process that is gone, known at once;
- no heartbeat for `silence_seconds` is a process that is stopped, or a machine that cannot be reached;
- a rank that the others have been a step ahead of for `collective_seconds` has a main thread that hangs, and so has one
  that still runs when the process groups' timeout (the same time) has ended a collective of another rank.
Only lines of text are exchanged; a connection that does not begin with the run's random word is closed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist

from megastruct.errors import EXIT_CODE_USER_ERROR, UserError
from megastruct.launch.environment import Process
from megastruct.launch.peers import Clock, Peer, is_of_a_collective, listen, own_name, place_of, silence_of
from megastruct.processes import allow_open_files

GRACE_SECONDS = 5.0  # in which ranks say what their own errors are, before the others end them
FILES_BESIDE = 4096  # that rank 0 may have open beside its connections
LAST_WORDS_SECONDS = 0.5  # in which a message reaches the others


class Watch:
    """This rank's part. Use as a context, after `join`; collective. A process alone is not watched."""

    def __init__(self, process: Process, silence_seconds: float, collective_seconds: float) -> None:
        self.process, self.silence, self.patience = process, silence_seconds, collective_seconds
        self.tick = min(1.0, silence_seconds / 10)
        self.step, self.arrivals = 0, 0
        self._main = threading.main_thread().ident
        self._goodbye: int | None = None
        self.link: socket.socket | None = None  # to rank 0
        self._failed = False
        self._ending: tuple[float, int] | None = None  # (when, code): another rank has ended with an error

    def arrived(self, step: int) -> None:
        """The main thread begins the step after `step` finished ones."""
        self.step = step
        self.arrivals += 1  # last; it only grows, while a spike makes the step smaller

    def __enter__(self) -> Watch:
        if self.process.world_size == 1:
            return self
        listener = listen() if self.process.rank == 0 else None
        meeting = [(listener.getsockname()[1], secrets.token_hex(16)) if listener else None]
        dist.broadcast_object_list(meeting)
        assert meeting[0] is not None
        port, word = meeting[0]
        if listener:
            _Centre(self, listener, word)
        else:
            self.link = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self.silence)
            self.link.sendall(f"{word} {self.process.rank} {own_name()}\n".encode())
            threading.Thread(target=self._report, args=(self.link,), name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Say goodbye. After an error that is another rank's, wait for the word which rank that is."""
        if self.process.world_size == 1:
            return
        if error is not None and is_of_a_collective(error):
            self._failed = True
            self._hurry()
            time.sleep(GRACE_SECONDS + 2 * self.tick)
        self._goodbye = 0 if error is None else EXIT_CODE_USER_ERROR if isinstance(error, UserError) else 1
        self._hurry()

    def _hurry(self) -> None:
        """Send a heartbeat now; from rank 0 it goes out with its next answers, which matter where something failed."""
        if self.link is not None:
            Peer(0, 0.0, self.link).send(self.beat())
        elif self._goodbye:
            time.sleep(2 * self.tick)

    def beat(self) -> str:
        """A heartbeat: goodbye code or -, whether a collective failed, step, arrivals, what the main thread does."""
        goodbye = "-" if self._goodbye is None else self._goodbye
        return f"{goodbye} {int(self._failed)} {self.step} {self.arrivals} {place_of(self._main)}"

    def _report(self, link: socket.socket) -> None:
        """On every rank but the first: send heartbeats, and wait for rank 0's answers or its word to end."""
        centre, clock = Peer(0, time.monotonic(), link), Clock(self.silence)
        link.settimeout(self.tick)
        while True:
            centre.send(self.beat())
            try:
                answers = centre.lines()
            except TimeoutError:
                answers = []
            except OSError:
                while self._ending:  # it has ended with an error of its own
                    self.end_late()
                    time.sleep(self.tick)
                if self._goodbye is None:
                    self.end(f"{centre} is lost: its process has ended", 1, speaks=self.process.rank == 1)
                return
            centre.heard = time.monotonic() if answers or clock.stood_still() else centre.heard
            for code, _, message in (answer.partition(" ") for answer in answers):
                if code != "-":
                    self.end(message, int(code))
            if time.monotonic() - centre.heard > self.silence and self._goodbye is None:
                self.end(silence_of(centre, self.silence), 1, speaks=self.process.rank == 1)
            self.end_late()
            if answers:
                time.sleep(self.tick)

    def end(self, message: str, code: int, speaks: bool = False) -> None:
        """End this process, without waiting for anything; with no message, after a time for its own one."""
        if self._goodbye is not None:
            return
        if not message:
            self._ending = self._ending or (time.monotonic() + GRACE_SECONDS, code)
            return
        if speaks or self.process.local_rank == 0:
            # The progress bar leaves its line open.
            print(f"\nerror: {message}\n    the same command goes on from the newest checkpoint", file=sys.stderr)
        _exit(code)

    def end_late(self) -> None:
        """Follow a rank that has ended with an error: it has said what it was."""
        if self._ending and time.monotonic() > self._ending[0] and self._goodbye is None:
            _exit(self._ending[1])


class _Centre:
    """Rank 0's part: hears all ranks, and tells all when one is missing."""

    def __init__(self, watch: Watch, listener: socket.socket, word: str) -> None:
        self.watch, self.listener, self.word = watch, listener, word
        allow_open_files(FILES_BESIDE + watch.process.world_size)
        now = time.monotonic()
        self.peers = [Peer(rank, now) for rank in range(watch.process.world_size)]
        self.peers[0].name = own_name()
        self.late_since: tuple[int, float] | None = (
            None  # the last ones' arrivals, and since when others are ahead of it
        )
        self.failed_since: float | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._hear, name="watch", daemon=True).start()

    def _hear(self) -> None:
        next_tick, clock = time.monotonic(), Clock(self.watch.silence)
        while True:
            for key, _ in self.selector.select(max(0.0, next_tick - time.monotonic())):
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    self._read(key.data, key.fileobj)
            if clock.stood_still():
                for peer in self.peers:
                    peer.heard = time.monotonic()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self.watch.tick
                self._note(self.peers[0], self.watch.beat())
                for peer in self.peers[1:]:
                    peer.send("-")
                self._judge()
                self.watch.end_late()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self.listener.accept()
            link.settimeout(self.watch.tick)
            self.selector.register(link, selectors.EVENT_READ, Peer(-1, time.monotonic(), link))

    def _read(self, peer: Peer, link: socket.socket) -> None:
        try:
            lines = peer.lines()
        except OSError:
            self.selector.unregister(link)
            link.close()
            if peer.rank >= 0:
                peer.link = None
                if peer.goodbye is None:
                    self._end(f"{peer} is lost: its process has ended{self._at(peer)}")
            return
        for line in lines:
            if peer.rank >= 0:
                self._note(peer, line)
                continue
            word, rank, name = [*line.split(" ", 2), "", "", ""][:3]
            if not secrets.compare_digest(word.encode(), self.word.encode()) or not rank.isdigit():
                self.selector.unregister(link)
                link.close()
                return
            peer.rank, peer.name = int(rank), name
            self.peers[peer.rank] = peer

    def _note(self, peer: Peer, line: str) -> None:
        goodbye, failed, step, arrivals, doing = [*line.split(" ", 4), "", "", "", "", ""][:5]
        peer.heard, peer.failed, peer.doing = time.monotonic(), failed == "1", doing
        peer.step, peer.arrivals = int(step), int(arrivals)
        if goodbye != "-" and peer.goodbye is None:
            peer.goodbye = int(goodbye)
            if peer.goodbye:  # it has said why, or will: the others only end
                for other in self.peers[1:]:
                    other.send(f"{peer.goodbye} ")
                self.watch.end("", peer.goodbye)

    def _judge(self) -> None:
        now, here = time.monotonic(), [peer for peer in self.peers if peer.goodbye is None]
        for peer in here:
            if now - peer.heard > self.watch.silence:
                self._end(silence_of(peer, self.watch.silence) + self._at(peer))
        low = min((peer.arrivals for peer in here), default=0)
        ahead = [peer for peer in here if peer.arrivals > low]
        if not ahead:
            self.late_since = None
        elif self.late_since is None or self.late_since[0] != low:
            self.late_since = low, now
        elif now - self.late_since[1] > self.watch.patience:
            self._end(self._late([peer for peer in here if peer.arrivals == low], min(peer.step for peer in ahead) + 1))
        failed = [peer for peer in here if peer.failed]
        self.failed_since = (self.failed_since or now) if failed else None
        if self.failed_since and now - self.failed_since > GRACE_SECONDS and len(failed) < len(here):
            self._end(self._late([peer for peer in here if not peer.failed], min(peer.step for peer in failed) + 1))

    def _late(self, peers: list[Peer], step: int) -> str:
        doing = "; ".join(f"{peer} is in {peer.doing}" for peer in peers[:8])
        more = f"; and {len(peers) - 8} more" if len(peers) > 8 else ""
        verb = "hang: they have" if len(peers) > 1 else "hangs: it has"
        names = ", ".join(f"{peer.rank}" for peer in peers[:8])
        return f"rank {names} {verb} not arrived where the others wait, at step {step}: {doing}{more}"

    def _at(self, peer: Peer) -> str:
        return f" (last heard of at step {peer.step + 1}, in {peer.doing})" if peer.doing else ""

    def _end(self, message: str) -> None:
        for peer in self.peers[1:]:
            peer.send(f"1 {message}")
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while time.monotonic() < deadline:  # what is unread when a connection closes would undo the message
            for key, _ in self.selector.select(LAST_WORDS_SECONDS / 10):
                with contextlib.suppress(OSError):
                    if key.fileobj is not self.listener and not key.fileobj.recv(65536):
                        self.selector.unregister(key.fileobj)
        self.watch.end(message, 1)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a collective would keep the process
