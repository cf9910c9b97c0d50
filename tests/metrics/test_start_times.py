"""The parts of a run's start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megastruct.metrics import start_times
from megastruct.metrics.start_times import StartTimes


def test_parts_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(start_times, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    times = StartTimes(3.0, "command")
    times.done("model")
    times.done("first step")
    assert str(times) == "after 5.5 s: command 3.0 s, model 2.0 s, first step 0.5 s"
