"""The learning rate, pinned at the points that define it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from configs import tiny_config
from megastruct.config.schedules import DECAYS, SCHEDULES
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


STEPS, PEAK, LOW, WARMUP, DECAY = 50, 0.3, 0.2, 7, 12


def rates(kind: str, num_steps: int = STEPS, length: int | None = None, **keys: Any) -> list[float]:
    """The learning rates of all steps; `length`: of the schedule, if it has one of its own."""
    keys |= {"num_steps": length}
    schedule = {"kind": kind, "warmup_steps": WARMUP, "min_learning_rate_fraction": LOW, **keys}
    config = tiny_config(training={"num_steps": num_steps}, optimizer={"learning_rate": PEAK}, schedule=schedule)
    return [learning_rate(config, step) for step in range(num_steps)]


def above(shape: float) -> float:
    return PEAK * (LOW + (1 - LOW) * shape)


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "cosine": ({}, lambda t: above((1 + math.cos(math.pi * (t - WARMUP) / (STEPS - 1 - WARMUP))) / 2)),
    "linear": ({}, lambda t: above(1 - (t - WARMUP) / (STEPS - 1 - WARMUP))),
    "constant": ({}, lambda t: PEAK),
    "inverse_sqrt": ({}, lambda t: PEAK * max(LOW, math.sqrt(WARMUP / (t + 1)))),
    "wsd linear": ({"decay_steps": DECAY}, lambda t: above(1 - max(0, t + 1 - STEPS + DECAY) / DECAY)),
    "wsd cosine": (
        {"decay": "cosine", "decay_fraction": DECAY / STEPS},
        lambda t: above((1 + math.cos(math.pi * max(0, t + 1 - STEPS + DECAY) / DECAY)) / 2),
    ),
    "wsd 1-sqrt": (
        {"decay": "1-sqrt", "decay_steps": DECAY},
        lambda t: above(1 - math.sqrt(max(0, t + 1 - STEPS + DECAY) / DECAY)),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_schedule_is_its_formula(name: str) -> None:
    keys, formula = FORMULAS[name]
    found = rates(name.split()[0], **keys)
    assert found[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)], rel=1e-14)
    assert found[WARMUP:] == pytest.approx([formula(step) for step in range(WARMUP, STEPS)], rel=1e-14)


def test_every_schedule_of_the_registry_has_a_formula_here() -> None:
    assert {name.split()[0] for name in FORMULAS} == set(SCHEDULES)
    assert {name.split()[1] for name in FORMULAS if " " in name} == set(DECAYS)


def test_a_longer_run_stretches_its_schedule_or_continues_it() -> None:
    short, stretched = rates("cosine"), rates("cosine", 2 * STEPS)
    continued = rates("cosine", 2 * STEPS, length=STEPS)
    assert continued == short + [pytest.approx(PEAK * LOW)] * STEPS
    assert stretched[-1] == pytest.approx(PEAK * LOW) and stretched[STEPS] > PEAK / 2
    wsd = {"decay_steps": DECAY}
    assert rates("wsd", 2 * STEPS, **wsd)[: STEPS - DECAY] == rates("wsd", **wsd)[: STEPS - DECAY]


def test_a_decay_of_its_own_is_the_end_of_the_long_run() -> None:
    decay = rates("wsd", DECAY, warmup_steps=0, decay_fraction=1.0, decay="1-sqrt")
    assert decay == rates("wsd", decay_steps=DECAY, decay="1-sqrt")[-DECAY:]


def test_progress_in_tokens() -> None:
    """Where the batch is half as large, a step advances the schedule by half a step."""
    training = {"num_steps": 60, "batch_size_warmup": [{"batch_size": 8, "num_steps": 20}]}
    schedule = {"kind": "linear", "warmup_steps": 5, "unit": "tokens"}
    warm = tiny_config(training=training, optimizer={"learning_rate": 1.0}, schedule=schedule)
    plain = tiny_config(
        training={"num_steps": 50}, optimizer={"learning_rate": 1.0}, schedule={**schedule, "unit": "steps"}
    )
    assert [learning_rate(warm, step) for step in range(20, 60)] == [learning_rate(plain, t) for t in range(10, 50)]
    assert [learning_rate(warm, step) for step in range(11)] == pytest.approx(
        [0.1 * (t + 1) for t in range(10)] + [1.0]
    )
    assert learning_rate(warm, 12) == learning_rate(plain, 6)
