"""Decides which rank is to blame, as a pure function of what the ranks have said, the time and the limits.

All times are seconds on the monotonic clock of the process that judges. Rank 0 judges all ranks; the others judge
rank 0 by the same function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megastruct.launch.watchdog.messages import Heartbeat

NAMED_RANKS = 8  # in one message, at most


@dataclass(frozen=True)
class Limits:
    """How long a rank may be silent, and how long the others may wait for it."""

    silence_seconds: float
    patience_seconds: float  # for a rank that lives but does not arrive
    grace_seconds: float = 5.0  # in which a rank whose collective failed may say goodbye or be found lost


@dataclass(frozen=True)
class Peer:
    """What is known about a rank."""

    rank: int
    heard_seconds: float  # when its last message came, or when the watch began
    name: str = ""  # process and host, once it has connected
    said: Heartbeat = field(default_factory=Heartbeat)  # the last one
    disconnected: bool = False  # its connection was open, and has closed
    malformed: bool = False  # it has sent a line that is not a message

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" ({self.name})" if self.name else "")

    def hear(self, heartbeat: Heartbeat, now: float) -> Peer:
        """This peer with a new heartbeat.

        Heartbeats of two threads may overtake each other, so goodbye and failure are kept once they were said.
        """
        goodbye = heartbeat.goodbye if self.said.goodbye is None else self.said.goodbye
        failed = heartbeat.failed or self.said.failed
        return replace(self, heard_seconds=now, said=replace(heartbeat, goodbye=goodbye, failed=failed))

    @property
    def last_place(self) -> str:
        """The step and the code of the last heartbeat, for messages; empty if there was none."""
        said = self.said
        return f" (last heard of at step {said.step + 1}, in {said.doing})" if said.doing else ""


@dataclass(frozen=True)
class State:
    """What `judge` remembers between calls. The first call takes State()."""

    judged_seconds: float = math.inf  # when it judged last
    awake_since_seconds: float = -math.inf  # the end of the last time in which this process stood still
    low_arrivals: int = 0  # the fewest of all ranks, and
    late_since_seconds: float | None = None  # since when other ranks are ahead of that
    failed_since_seconds: float | None = None  # since when a collective has failed on a rank that still runs


@dataclass(frozen=True)
class Verdict:
    """The decision that the run must end: because of which ranks, and why."""

    ranks: tuple[int, ...]
    why: Literal["lost", "malformed", "ended", "silent", "late", "left out"]
    step: int | None = None  # where the other ranks wait; for one rank alone, the step it was heard of last
    message: str = ""  # empty if the rank ended with an error of its own, which it reports itself
    code: int = 1


def judge(peers: Sequence[Peer], now: float, limits: Limits, state: State) -> tuple[Verdict | None, State]:
    """The first reason to end the run, or None, and the state for the next call.

    The caller judges much more often than once in `silence_seconds / 2`. A longer time between two calls means that
    this process itself was stopped (SIGSTOP, a sleeping machine), and no rank is blamed for that time.
    """
    if now - state.judged_seconds > limits.silence_seconds / 2:
        state = State(awake_since_seconds=now)
    running = [peer for peer in peers if peer.said.goodbye is None]
    state = _remember(running, now, replace(state, judged_seconds=now))
    verdict = (
        _lost(running)
        or _malformed(running)
        or _ended(peers)
        or _silent(running, now, limits, state)
        or _late(running, now, limits, state)
        or _left_out(running, now, limits, state)
    )
    return verdict, state


def _remember(running: Sequence[Peer], now: float, state: State) -> State:
    """The state with updated times since when ranks are late and since when a collective has failed."""
    low = min((peer.said.arrivals for peer in running), default=0)
    late_since = None
    if any(peer.said.arrivals > low for peer in running):
        known = state.late_since_seconds if state.low_arrivals == low else None
        late_since = now if known is None else known
    failed_since = None
    if any(peer.said.failed for peer in running):
        failed_since = now if state.failed_since_seconds is None else state.failed_since_seconds
    return replace(state, low_arrivals=low, late_since_seconds=late_since, failed_since_seconds=failed_since)


def _lost(running: Sequence[Peer]) -> Verdict | None:
    for peer in running:
        if peer.disconnected:
            message = f"{peer} is lost: its process has ended{peer.last_place}"
            return Verdict((peer.rank,), "lost", peer.said.step + 1, message)
    return None


def _malformed(running: Sequence[Peer]) -> Verdict | None:
    for peer in running:
        if peer.malformed:
            message = f"{peer} sent a message that cannot be read: all nodes must run the same version of megastruct"
            return Verdict((peer.rank,), "malformed", peer.said.step + 1, message)
    return None


def _ended(peers: Sequence[Peer]) -> Verdict | None:
    for peer in peers:
        if peer.said.goodbye:
            return Verdict((peer.rank,), "ended", peer.said.step + 1, code=peer.said.goodbye)
    return None


def _silent(running: Sequence[Peer], now: float, limits: Limits, state: State) -> Verdict | None:
    for peer in running:
        if now - max(peer.heard_seconds, state.awake_since_seconds) > limits.silence_seconds:
            cause = "it is stopped, or its machine cannot be reached"
            message = f"{peer} has been silent for {limits.silence_seconds:g} s: {cause}{peer.last_place}"
            return Verdict((peer.rank,), "silent", peer.said.step + 1, message)
    return None


def _late(running: Sequence[Peer], now: float, limits: Limits, state: State) -> Verdict | None:
    """Ranks that have not begun a step which others began `patience_seconds` ago."""
    if state.late_since_seconds is None or now - state.late_since_seconds <= limits.patience_seconds:
        return None
    late = [peer for peer in running if peer.said.arrivals == state.low_arrivals]
    step = min(peer.said.step for peer in running if peer.said.arrivals > state.low_arrivals) + 1
    return _hanging(late, "late", step, f"never reached step {step}, where the other ranks are waiting")


def _left_out(running: Sequence[Peer], now: float, limits: Limits, state: State) -> Verdict | None:
    """Ranks whose main thread still runs after a collective has failed on others: it timed out without them."""
    hanging = [peer for peer in running if not peer.said.failed]
    if state.failed_since_seconds is None or now - state.failed_since_seconds <= limits.grace_seconds or not hanging:
        return None
    step = min(peer.said.step for peer in running if peer.said.failed) + 1
    what = f"never joined the other ranks in a collective operation of step {step}, which failed"
    return _hanging(hanging, "left out", step, what)


def _hanging(peers: Sequence[Peer], why: Literal["late", "left out"], step: int, what: str) -> Verdict:
    named, more = peers[:NAMED_RANKS], len(peers) - NAMED_RANKS
    ranks = ("rank " if len(peers) == 1 else "ranks ") + ", ".join(str(peer.rank) for peer in named)
    ranks += f" and {more} more" if more > 0 else ""
    verb = "hangs: it" if len(peers) == 1 else "hang: they"
    places = "; ".join(f"{peer} is in {peer.said.doing}" for peer in named)
    return Verdict(tuple(peer.rank for peer in peers), why, step, f"{ranks} {verb} {what}: {places}")
