"""When a run goes back after a spike, and what it leaves out: without processes."""

from __future__ import annotations

import pytest

from configs import tiny_config
from megastruct.planning.steps import guided_steps
from megastruct.run.divergence import Divergence
from megastruct.run.way_back import is_way_back

# 20 base steps, guided for the first 10, whose tokens are read again at the end
GUIDED = tiny_config(guided={"schedule": "fixedflop", "fraction": 0.5, "levels": 4})
BASE = GUIDED.training.base_steps


@pytest.mark.parametrize(
    ("spike", "to", "guides_left", "possible"),
    [
        (8, 0, False, False),  # no checkpoint
        (8, 5, False, True),
        (12, 9, True, False),  # the guides are gone
        (12, 10, True, True),
        (BASE, BASE - 1, True, True),
        (BASE + 3, BASE - 1, True, False),
        (BASE + 3, BASE, True, False),  # the second reading would begin at its start, with the spike's data
        (BASE + 3, BASE + 1, True, True),
    ],
)
def test_a_way_back(spike: int, to: int, guides_left: bool, possible: bool) -> None:
    assert guided_steps(GUIDED) == 10
    assert is_way_back(GUIDED, spike, to, guides_left) is possible


def test_the_second_reading_leaves_nothing_out() -> None:
    for step, skipped in ((BASE - 1, 3), (BASE, 0), (BASE + 1, 3)):
        assert Divergence(GUIDED, {"step": step, "skipped_data_steps": 3}).skipped_data_steps == skipped
