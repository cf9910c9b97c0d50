"""The schedules of learning rate and alpha, as pure functions of the step. The loop in train.py applies them."""

from __future__ import annotations

import math
from typing import NamedTuple

from megastruct.config.schema import Config
from megastruct.planning.steps import guided_steps, total_steps


class Scheduled(NamedTuple):
    """The scheduled values of one step."""

    learning_rate: float
    alpha: float


def scheduled(config: Config, step: int) -> Scheduled:
    """The scheduled values of the step that follows `step` finished steps."""
    return Scheduled(learning_rate(config, step), alpha(config, step))


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the optimizer step that follows `step` finished steps.

    Linear from 0 to the peak over the warm-up (reached at its last step), then half a cosine down to
    `min_learning_rate_fraction` of the peak at the run's last step.
    """
    peak, total = config.optimizer.learning_rate, total_steps(config)
    warmup = round(config.schedule.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    low = config.schedule.min_learning_rate_fraction
    return peak * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def alpha(config: Config, step: int) -> float:
    """The weight of the guide in the blend, for the step that follows `step` finished steps.

    It falls from 1 at the start to 0 at the end of the guided steps, along half a cosine or a line. Source: arXiv
    2406.16450, section 3.
    """
    guided = guided_steps(config)
    if step >= guided:
        return 0.0
    progress = step / guided
    return 1.0 - progress if config.guided.alpha == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
