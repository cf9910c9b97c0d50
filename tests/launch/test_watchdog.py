"""Who is named as late: rank 0's judgement, without processes."""

from __future__ import annotations

from typing import Any

import pytest

from megastruct.launch.environment import current_process
from megastruct.launch.peers import Peer
from megastruct.launch.watchdog import Watch, _Centre


def test_the_rank_that_hangs_is_named_after_a_return_to_an_earlier_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 hangs after step 8; rank 0 has gone back to step 6."""
    watch = Watch(current_process(), silence_seconds=60.0, collective_seconds=0.0)
    centre: Any = object.__new__(_Centre)
    centre.watch, centre.late_since, centre.failed_since = watch, None, None
    centre.peers = [Peer(0, 0.0), Peer(1, 0.0)]
    watch.arrived(8)
    centre._note(centre.peers[1], watch.beat())
    watch.arrived(6)
    centre._note(centre.peers[0], watch.beat())
    said: list[str] = []
    monkeypatch.setattr(centre, "_end", said.append)
    centre._judge()
    while not said:
        centre._judge()
    assert said[0].startswith("rank 1 hangs: it has not arrived where the others wait, at step 7"), said
