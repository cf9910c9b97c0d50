"""How long a run is, and which data each of its steps reads. Pure functions of the config and the step.

A step is counted by the optimizer steps before it. A self-guided run has its guide in the first `guided_steps`; under
`fixedflop` the tokens of those steps are read again at the end, in the same order (arXiv 2406.16450, section 3).
"""

from __future__ import annotations

from megastruct.config.schema import Config
from megastruct.models.cost import guided_fraction


def guided_steps(config: Config) -> int:
    """Steps with the guide, 0 without one."""
    guided, base = config.guided, config.training.base_steps
    if guided.schedule == "off":
        return 0
    if guided.fraction is not None:
        return round(guided.fraction * base)
    return round((guided_fraction(config) if guided.schedule == "fixedflop" else 0.5) * base)


def total_steps(config: Config) -> int:
    """All steps, those that read data again included."""
    repeated = guided_steps(config) if config.guided.schedule == "fixedflop" else 0
    return config.training.base_steps + repeated


def data_step(config: Config, step: int) -> int:
    """The position in the data, in steps, that `step` reads: from the base steps' end on, again from the start."""
    base = config.training.base_steps
    return step if step < base else step - base
