"""Schedules: pure functions of the step, applied on visible lines of the loop in train.py."""

from __future__ import annotations

import math

from megastruct.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the optimizer step that follows `step` finished steps.

    Linear from 0 to the peak over the warm-up (reached at its last step), then half a cosine down to
    `min_learning_rate_fraction` of the peak at the run's last step.
    """
    peak, total = config.optimizer.learning_rate, config.training.total_steps
    warmup = round(config.schedule.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    low = config.schedule.min_learning_rate_fraction
    return peak * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))
