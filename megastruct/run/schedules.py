"""The schedules of learning rate and alpha, as pure functions of the step. The loop in train.py applies them."""

from __future__ import annotations

from typing import NamedTuple

from megastruct.config.schedules import SCHEDULES, Place, cosine_shape
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

    Linear from 0 to the peak over the warm-up (reached at its last step), then as `schedule.kind` says.
    """
    peak, place = config.optimizer.learning_rate, place_of(config, step)
    if place.before < place.warmup:
        return peak * min(place.after, place.warmup) / place.warmup
    return peak * SCHEDULES[config.schedule.kind].factor(place, config.schedule)


def place_of(config: Config, step: int) -> Place:
    """Where the step that follows `step` finished steps lies in the schedule.

    Progress is counted in steps, or in the tokens of a full batch, which are as many steps once the batch size is
    warmed up.
    """
    schedule, training = config.schedule, config.training
    num_steps = schedule.num_steps or total_steps(config)
    count = _full_batches if schedule.unit == "tokens" and not training.batch_sizes.is_constant else _steps
    total = count(config, num_steps)
    warmup = round(schedule.warmup_fraction * total) if schedule.warmup_steps is None else schedule.warmup_steps
    return Place(count(config, step), count(config, step + 1), warmup, total)


def _steps(config: Config, num_steps: int) -> float:
    return num_steps


def _full_batches(config: Config, num_steps: int) -> float:
    return config.training.batch_sizes.samples(num_steps) / config.training.global_batch_size


def alpha(config: Config, step: int) -> float:
    """The weight of the guide in the blend, for the step that follows `step` finished steps.

    It falls from 1 at the start to 0 at the end of the guided steps, along half a cosine or a line. Source: arXiv
    2406.16450, section 3.
    """
    guided = guided_steps(config)
    if step >= guided:
        return 0.0
    progress = step / guided
    return 1.0 - progress if config.guided.alpha == "linear" else cosine_shape(progress)
