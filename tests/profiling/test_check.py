"""What cannot be profiled is refused before training, with what would work."""

from __future__ import annotations

from typing import Any

import pytest

from configs import tiny_config
from megastruct.config.compare import changes_of_the_run
from megastruct.profiling.check import profiling_problems

SNAPSHOT = {"memory_steps": (3,), "memory_at_out_of_memory": True}


@pytest.mark.parametrize(
    "keys, device, found",
    [
        ({}, "cpu", []),
        ({"steps": (1, 20), "ranks": (0, 3), "flight_recorder_entries": 10}, "cpu", []),
        ({"steps": (20, 21, 30)}, "cpu", ["profiling.steps: 21, 30 are after the last step, 20"]),
        ({"memory_steps": (21,)}, "cuda", ["profiling.memory_steps: 21 is after the last step, 20"]),
        ({"steps": (1,), "ranks": (0, 4)}, "cpu", ["profiling.ranks: there is no rank 4: there are 4, from 0 on"]),
        ({"ranks": (4,)}, "cpu", []),  # nothing is recorded
        (SNAPSHOT, "cuda", []),
        (SNAPSHOT, None, []),  # this machine only starts the ranks of others
        (
            SNAPSHOT,
            "cpu",
            ["profiling.memory_steps: the run is on a CPU", "profiling.memory_at_out_of_memory: the run"],
        ),
    ],
)
def test_problems(keys: dict[str, Any], device: str | None, found: list[str]) -> None:
    problems = list(profiling_problems(tiny_config(profiling=keys), 4, device))
    assert len(problems) == len(found)
    assert all(
        str(problem).startswith(start) and problem.suggestion for problem, start in zip(problems, found, strict=True)
    )


def test_the_section_may_change_in_a_run() -> None:
    assert changes_of_the_run(tiny_config(), tiny_config(profiling={"steps": (3,), "ranks": (1,)})) == []
