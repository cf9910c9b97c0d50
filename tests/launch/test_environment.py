"""Threads of a process: its share of the machine's cores."""

from __future__ import annotations

import os

import pytest

from megastruct.launch.environment import take_share_of_cores


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 32),
        ({"LOCAL_SIZE": "8"}, 4),
        ({"LOCAL_WORLD_SIZE": "8"}, 4),
        ({"LOCAL_SIZE": "64"}, 1),
        ({"LOCAL_SIZE": "8", "OMP_NUM_THREADS": "3"}, 3),
        ({"LOCAL_SIZE": "8", "OMP_NUM_THREADS": "many"}, 4),
    ],
)
def test_a_process_takes_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert take_share_of_cores() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
