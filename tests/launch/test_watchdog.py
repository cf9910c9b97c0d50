"""Who is to blame: the judgement as a table of situations, without processes, sockets or clocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from megastruct.launch.watchdog.judgement import Limits, Peer, State, Verdict, judge
from megastruct.launch.watchdog.messages import Heartbeat

LIMITS = Limits(silence_seconds=10.0, patience_seconds=30.0, grace_seconds=5.0)


@dataclass(frozen=True)
class Rank:
    """What rank 0 knows about a rank; `heard`: when it was heard of last, None while it is heard of all the time."""

    step: int = 6
    arrivals: int = 7
    heard: float | None = None
    goodbye: int | None = None
    failed: bool = False
    disconnected: bool = False
    malformed: bool = False

    def peer(self, rank: int, now: float) -> Peer:
        said = Heartbeat(self.step, self.arrivals, f"train.py:{rank} wait", self.failed, self.goodbye)
        heard = now if self.heard is None else self.heard
        return Peer(rank, heard, f"process 7{rank} on a", said, self.disconnected, self.malformed)


Moments = dict[int, Sequence[Rank]]  # the ranks from a second on


def judged(moments: Moments, until: int, asleep: range = range(0)) -> tuple[int, Verdict] | None:
    """The first verdict, and its second, of a judge that is asked every second, except while it is `asleep`."""
    state, ranks = State(), moments[0]
    for now in range(until + 1):
        ranks = moments.get(now, ranks)
        if now in asleep:
            continue
        verdict, state = judge([rank.peer(i, now) for i, rank in enumerate(ranks)], float(now), LIMITS, state)
        if verdict:
            return now, verdict
    return None


here, ahead, behind = Rank(), Rank(step=7, arrivals=8), Rank(step=5, arrivals=6)
failed, gone = Rank(failed=True), Rank(disconnected=True)
well, wrong = Rank(goodbye=0), Rank(goodbye=2)
quiet = Rank(heard=3.0)

# Name: (moments, until, expected): the second, why, the ranks and the step of the verdict, or None up to `until`.
SITUATIONS: dict[str, tuple[Moments, int, tuple[int, str, tuple[int, ...], int] | None]] = {
    "nobody is late": ({0: [here, here, here]}, 300, None),
    "nobody has begun a step": ({0: [Rank(0, 0), Rank(0, 0)]}, 300, None),
    "one is silent": ({0: [here, here, quiet]}, 60, (14, "silent", (2,), 7)),
    "one is silent for less than the limit": ({0: [here, here, quiet]}, 13, None),
    "one is silent and comes back": ({0: [here, quiet], 13: [here, here]}, 300, None),
    "one never connects": ({0: [here, Rank(0, 0, heard=0.0)]}, 60, (11, "silent", (1,), 1)),
    "one is silent and a step behind": ({0: [ahead, quiet]}, 60, (14, "silent", (1,), 7)),
    "one has said goodbye and is silent": ({0: [here, Rank(heard=0.0, goodbye=0)]}, 300, None),
    "one is gone without goodbye": ({0: [here, here], 5: [here, gone]}, 60, (5, "lost", (1,), 7)),
    "one is gone after goodbye 0": ({0: [here, Rank(goodbye=0, disconnected=True)]}, 300, None),
    "one has said goodbye 0": ({0: [here, well]}, 300, None),
    "all have said goodbye 0": ({0: [well, well]}, 300, None),
    "one has said goodbye 2": ({0: [here, here], 5: [here, wrong]}, 60, (5, "ended", (1,), 7)),
    "one is gone after goodbye 2": (
        {0: [here, here], 5: [here, replace(wrong, disconnected=True)]},
        60,
        (5, "ended", (1,), 7),
    ),
    "one is gone, and another one ends because of it": (
        {0: [here, here, here], 5: [here, Rank(goodbye=1), gone]},
        60,
        (5, "lost", (2,), 7),
    ),
    "one has ended with an error, and others wait for it": (
        {0: [ahead, behind, ahead], 5: [ahead, replace(behind, goodbye=2), failed]},
        60,
        (5, "ended", (1,), 6),
    ),
    "one sends what is no message": ({0: [here, replace(here, malformed=True)]}, 60, (0, "malformed", (1,), 7)),
    "one is late by less than the patience": ({0: [here, here], 5: [ahead, here]}, 35, None),
    "one is late by more than the patience": ({0: [here, here], 5: [ahead, here]}, 60, (36, "late", (1,), 8)),
    "rank 0 is late": ({0: [here, ahead, ahead]}, 60, (31, "late", (0,), 8)),
    "several are late": ({0: [here, ahead, here, ahead]}, 60, (31, "late", (0, 2), 8)),
    "the slowest of several is late": ({0: [behind, here, ahead]}, 60, (31, "late", (0,), 7)),
    "one is late, and its arrivals grow": (
        {0: [behind, ahead], 25: [here, ahead], 50: [here, Rank(8, 9)], 54: [ahead, Rank(8, 9)]},
        84,
        None,
    ),
    "one is late, arrives, and is late again": (
        {0: [here, ahead], 25: [ahead, ahead], 26: [ahead, Rank(8, 9)]},
        56,
        None,
    ),
    "another one is late, one after the other": ({0: [here, ahead], 25: [Rank(8, 9), ahead]}, 55, None),
    "one is late, and the others have said goodbye": (
        {0: [here, ahead], 5: [here, replace(ahead, goodbye=0)]},
        300,
        None,
    ),
    "a spike: a smaller step is no delay": ({0: [Rank(8, 9), Rank(8, 9)], 5: [Rank(6, 10), Rank(6, 10)]}, 300, None),
    "a spike: one hangs before it goes back": ({0: [Rank(6, 10), Rank(8, 9)]}, 60, (31, "late", (1,), 7)),
    "a spike: one hangs after it, at a smaller step": ({0: [Rank(8, 12), Rank(6, 10)]}, 60, (31, "late", (1,), 9)),
    "a collective failed, for less than the grace": ({0: [here, here], 5: [failed, here]}, 10, None),
    "a collective failed, for more than the grace": (
        {0: [here, here], 5: [failed, here]},
        60,
        (11, "left out", (1,), 7),
    ),
    "a collective failed on several, and several run": (
        {0: [here, failed, here, failed]},
        60,
        (6, "left out", (0, 2), 7),
    ),
    "a collective failed on all": ({0: [failed, failed, failed]}, 300, None),
    "a collective failed on all, one by one": ({0: [failed, here], 5: [failed, failed]}, 300, None),
    "a collective failed, and one is gone within the grace": (
        {0: [failed, failed, here], 3: [failed, failed, gone]},
        60,
        (3, "lost", (2,), 7),
    ),
    "a collective failed on one, which then says goodbye": (
        {0: [failed, here], 4: [replace(failed, goodbye=1), here]},
        60,
        (4, "ended", (0,), 7),
    ),
    "a collective failed on all that have not said goodbye": ({0: [failed, well]}, 300, None),
    "nobody is left to hear": ({0: []}, 300, None),
}


@pytest.mark.parametrize("moments, until, expected", SITUATIONS.values(), ids=SITUATIONS)
def test_who_is_blamed_and_when(
    moments: Moments, until: int, expected: tuple[int, str, tuple[int, ...], int] | None
) -> None:
    found = judged(moments, until)
    assert (found and (found[0], found[1].why, found[1].ranks, found[1].step)) == expected


@pytest.mark.parametrize(
    "moments, until, expected",
    [
        pytest.param({0: [here, Rank(heard=4.0)], 70: [here, here]}, 200, None, id="all stood still"),
        pytest.param({0: [here, Rank(heard=4.0)]}, 200, (71, "silent", (1,)), id="one never goes on"),
        pytest.param({0: [here, ahead], 70: [ahead, ahead]}, 200, None, id="one was a step behind"),
        pytest.param({0: [here, ahead]}, 200, (91, "late", (0,)), id="one hangs"),
        pytest.param({0: [here, failed], 63: [failed, failed]}, 200, None, id="a collective had failed"),
        pytest.param({0: [here, here], 30: [here, gone]}, 200, (60, "lost", (1,)), id="one is gone since"),
    ],
)
def test_the_time_in_which_the_judge_itself_stood_still_is_nobodys_fault(
    moments: Moments, until: int, expected: tuple[int, str, tuple[int, ...]] | None
) -> None:
    """SIGSTOP from second 5 to second 60: silence, patience and grace begin anew."""
    found = judged(moments, until, asleep=range(5, 60))
    assert (found and (found[0], found[1].why, found[1].ranks)) == expected


def test_the_judge_that_is_asked_late_but_did_not_stand_still_forgets_nothing() -> None:
    """A busy machine: up to half of the silence between two questions."""
    state, peers = State(), [here.peer(0, math.inf), ahead.peer(1, math.inf)]
    for now in range(0, 31, 5):
        verdict, state = judge(peers, float(now), LIMITS, state)
        assert verdict is None
    verdict, _ = judge(peers, 35.0, LIMITS, state)
    assert verdict and verdict.why == "late"


MESSAGES: dict[str, tuple[Sequence[Rank], str]] = {
    "lost": (
        [here, gone],
        "rank 1 (process 71 on a) is lost: its process has ended (last heard of at step 7, in train.py:1 wait)",
    ),
    "silent": (
        [here, Rank(heard=-20.0)],
        "rank 1 (process 71 on a) has been silent for 10 s: it is stopped, or its machine cannot be reached "
        "(last heard of at step 7, in train.py:1 wait)",
    ),
    "malformed": (
        [replace(here, malformed=True)],
        "rank 0 (process 70 on a) sent a message that cannot be read: all nodes must run the same version of "
        "megastruct",
    ),
    "ended": ([here, wrong], ""),
    "late": (
        [ahead, here],
        "rank 1 hangs: it never reached step 8, where the other ranks are waiting: rank 1 (process 71 on a) is in "
        "train.py:1 wait",
    ),
    "two are late": (
        [here, ahead, here],
        "ranks 0, 2 hang: they never reached step 8, where the other ranks are waiting: rank 0 (process 70 on a) is in "
        "train.py:0 wait; rank 2 (process 72 on a) is in train.py:2 wait",
    ),
    "left out": (
        [failed, here],
        "rank 1 hangs: it never joined the other ranks in a collective operation of step 7, which failed: rank 1 "
        "(process 71 on a) is in train.py:1 wait",
    ),
}


@pytest.mark.parametrize("ranks, message", MESSAGES.values(), ids=MESSAGES)
def test_what_the_user_reads(ranks: Sequence[Rank], message: str) -> None:
    found = judged({0: ranks}, 60)
    assert found and found[1].message == message
    assert found[1].code == (1 if message else 2)


def test_only_some_of_many_ranks_are_named() -> None:
    found = judged({0: [here] * 20 + [ahead]}, 60)
    assert found and found[1].ranks == tuple(range(20))
    assert found[1].message.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more hang: they never reached step 8")
    assert "rank 7 (" in found[1].message and "rank 8 (" not in found[1].message


def test_a_rank_that_was_never_heard_of_has_no_last_place() -> None:
    verdict, _ = judge([Peer(1, 0.0)], 11.0, LIMITS, State())
    assert verdict and verdict.message.startswith("rank 1 has been silent for 10 s")
    assert "last heard of" not in verdict.message


def test_an_older_heartbeat_takes_no_goodbye_and_no_failure_back() -> None:
    """Two threads of a rank send heartbeats; one may overtake the other."""
    peer = Peer(1, 0.0).hear(Heartbeat(6, 7, failed=True, goodbye=2), 1.0).hear(Heartbeat(6, 7, "train.py:3"), 2.0)
    assert (peer.said.goodbye, peer.said.failed, peer.said.doing, peer.heard_seconds) == (2, True, "train.py:3", 2.0)
