"""How long a run is, what it costs, and which data each of its steps reads. Pure functions of the config and the step.

A step is counted by the optimizer steps before it. A self-guided run has its guide in the first `guided_steps`; under
`fixedflop` the tokens of those steps are read again at the end, in the same order (arXiv 2406.16450, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator

from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.planning.cost import guided_fraction, mean_guide_share, training_flops_per_token


def guided_steps(config: Config) -> int:
    """Steps with the guide, 0 without one."""
    guided, base = config.guided, config.training.base_steps
    if guided.schedule == "off":
        return 0
    if guided.fraction is not None:
        return round(guided.fraction * base)
    return round((guided_fraction(config) if guided.schedule == "fixedflop" else 0.5) * base)


def check_guided_steps(config: Config) -> Iterator[Problem]:
    """What only the model's own costs show: a guided run needs a guided step."""
    if config.guided.schedule != "off" and not guided_steps(config):
        at = f"of training's {config.training.base_steps} base steps"
        if config.guided.fraction is None and guided_fraction(config) == 0.0:
            found = f"fixedflop, but the {config.ffn.structure} model costs as much as the dense one: nothing is saved"
            yield Problem(
                "guided.schedule", found, "a smaller ffn.rank, more ffn.nblocks, or guided.schedule=fixedstep"
            )
        else:
            yield Problem("guided.schedule", f"no guided step {at}", "a larger guided.fraction, or a longer run")


def total_steps(config: Config) -> int:
    """All steps, those that read data again included."""
    repeated = guided_steps(config) if config.guided.schedule == "fixedflop" else 0
    return config.training.base_steps + repeated


def data_step(config: Config, step: int) -> int:
    """The position in the data, in steps, that `step` reads: from the base steps' end on, again from the start."""
    base = config.training.base_steps
    return step if step < base else step - base


def total_tokens(config: Config) -> int:
    """Tokens that are trained on, those that are read again counted again. What the config asks for, not rounded to
    whole steps."""
    base = config.training.num_tokens or config.training.base_steps * config.training.tokens_per_step
    return round(base * total_steps(config) / config.training.base_steps)


def total_training_flops(config: Config) -> float:
    """Of the whole run: the guides count for the mean share of the guided steps' tokens that they see."""
    guided = guided_steps(config) / total_steps(config)
    return total_tokens(config) * (
        guided * training_flops_per_token(config, mean_guide_share(config))
        + (1.0 - guided) * training_flops_per_token(config)
    )
