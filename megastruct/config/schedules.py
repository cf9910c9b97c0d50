"""The schedules of the learning rate that a run may have, by `schedule.kind`. `register_schedule` adds one.

A schedule is a pure function of the place in the run. `run/schedules.py` computes the place, and the warm-up, which all
schedules share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megastruct.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Place:
    """Where a step after the warm-up lies, in steps, or in full batches if the schedule counts tokens.

    Attributes:
        before: finished before the step.
        after: finished with it.
        warmup: length of the warm-up.
        total: length of the schedule; the run may be longer.
    """

    before: float
    after: float
    warmup: int
    total: float

    @property
    def progress(self) -> float:
        """From 0 in the first step after the warm-up to 1 in the last step of the schedule and beyond it."""
        return min(1.0, (self.before - self.warmup) / max(1, self.total - 1 - self.warmup))


@dataclass(frozen=True)
class Schedule:
    """`factor(place, schedule)`: the learning rate as a share of its peak. `keys`: its own keys of the section."""

    name: str
    factor: Callable[[Place, ScheduleConfig], float]
    keys: tuple[str, ...] = ()


def cosine_shape(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# How a decay falls from 1 at 0 to 0 at 1. 1-sqrt: Hägele et al. 2024 (arXiv 2405.18392), equation 2.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": cosine_shape,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def decay_length(schedule: ScheduleConfig, total: float) -> int:
    """The length of the decay of `wsd`, in steps or full batches."""
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    return round((DEFAULT_DECAY_FRACTION if schedule.decay_fraction is None else schedule.decay_fraction) * total)


DEFAULT_DECAY_FRACTION = 0.2  # from where on a longer decay gains little (arXiv 2405.18392, section 4)


def _cosine(place: Place, schedule: ScheduleConfig) -> float:
    return _above(schedule.min_learning_rate_fraction, cosine_shape(place.progress))


def _linear(place: Place, schedule: ScheduleConfig) -> float:
    return _above(schedule.min_learning_rate_fraction, 1.0 - place.progress)


def _constant(place: Place, schedule: ScheduleConfig) -> float:
    return 1.0


def _warmup_stable_decay(place: Place, schedule: ScheduleConfig) -> float:
    """1, then the decay, which reaches its end in the schedule's last step (arXiv 2404.06395, section 4)."""
    length = decay_length(schedule, place.total)
    into_decay = place.after - (place.total - length)
    if length == 0 or into_decay <= 0:
        return 1.0
    return _above(
        schedule.min_learning_rate_fraction, DECAYS[schedule.decay or "linear"](min(1.0, into_decay / length))
    )


def _inverse_sqrt(place: Place, schedule: ScheduleConfig) -> float:
    """1 at the end of the warm-up, then as 1 / sqrt(step), not below the minimum (arXiv 1706.03762, section 5.3)."""
    return max(schedule.min_learning_rate_fraction, math.sqrt(min(1.0, max(1, place.warmup) / place.after)))


def _above(minimum: float, shape: float) -> float:
    return minimum + (1.0 - minimum) * shape


SCHEDULES: dict[str, Schedule] = {}


def register_schedule(schedule: Schedule) -> None:
    """Add a schedule. Raises ValueError if its name is taken by another."""
    if SCHEDULES.setdefault(schedule.name, schedule) != schedule:
        raise ValueError(f"schedule {schedule.name!r} is registered already: {SCHEDULES[schedule.name]}")


register_schedule(Schedule("cosine", _cosine))
register_schedule(Schedule("linear", _linear))
register_schedule(Schedule("constant", _constant))
register_schedule(Schedule("wsd", _warmup_stable_decay, ("decay", "decay_fraction", "decay_steps")))
register_schedule(Schedule("inverse_sqrt", _inverse_sqrt))
