"""The learning rate, pinned at the points that define it."""

from __future__ import annotations

import itertools

import pytest

from configs import tiny_config
from megastruct.run.schedules import learning_rate


def test_warm_up_then_cosine() -> None:
    config = tiny_config(training={"num_steps": 101}, optimizer={"learning_rate": 1.0})
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)  # 10 steps of warm-up
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way: the middle of 1.0 and 0.1
    assert rates[100] == pytest.approx(0.1)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[10:]))


def test_edges() -> None:
    assert learning_rate(tiny_config(training={"num_steps": 1}), 0) == 1e-2
    flat = tiny_config(schedule={"warmup_fraction": 0.0, "min_learning_rate_fraction": 1.0})
    assert {learning_rate(flat, step) for step in range(20)} == {1e-2}


def test_length_from_tokens() -> None:
    config = tiny_config(training={"num_steps": None, "num_tokens": 16 * 8 * 37})
    assert config.training.base_steps == 37
