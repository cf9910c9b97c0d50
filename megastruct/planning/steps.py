"""The length of a run, its cost, and the data that each step reads, as pure functions of the config and the step.

The number of a step is the number of optimizer steps before it. A self-guided run has guides in its first
`guided_steps`. With `fixedflop` the tokens of those steps are read again at the end, in the same order (arXiv
2406.16450, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator

from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.planning.cost import guided_fraction, mean_guide_share, training_flops_per_token


def guided_steps(config: Config) -> int:
    """The number of steps with guides, 0 if the run has none."""
    guided, base = config.guided, config.training.base_steps
    if guided.schedule == "off":
        return 0
    if guided.fraction is not None:
        return round(guided.fraction * base)
    return round((guided_fraction(config) if guided.schedule == "fixedflop" else 0.5) * base)


def check_guided_steps(config: Config) -> Iterator[Problem]:
    """A problem if a self-guided run would have no guided step, which depends on the costs of the model."""
    if config.guided.schedule != "off" and not guided_steps(config):
        at = f"of training's {config.training.base_steps} base steps"
        if config.guided.fraction is None and guided_fraction(config) == 0.0:
            found = (
                f"fixedflop, but the {config.ffn.structure} model costs as much as the dense one, so no FLOPs are left"
            )
            yield Problem(
                "guided.schedule", found, "a smaller ffn.rank, more ffn.nblocks, or guided.schedule=fixedstep"
            )
        else:
            yield Problem("guided.schedule", f"no guided step {at}", "a larger guided.fraction, or a longer run")


def total_steps(config: Config) -> int:
    """The number of all steps, including those that read data again."""
    repeated = guided_steps(config) if config.guided.schedule == "fixedflop" else 0
    return config.training.base_steps + repeated


def data_step(config: Config, step: int) -> int:
    """The position in the data, in steps, that `step` reads; after the base steps it starts again at 0."""
    base = config.training.base_steps
    return step if step < base else step - base


def data_sample(config: Config, step: int) -> int:
    """The global sample with which `step` begins, if no data was skipped and the run began with the first one."""
    return config.training.batch_sizes.samples(data_step(config, step))


def total_tokens(config: Config) -> int:
    """Tokens that the run trains on, as the config asks for them, not rounded to whole steps.

    Tokens that are read again count again.
    """
    training = config.training
    base = training.num_tokens or training.tokens(training.base_steps)
    return round(base * total_steps(config) / training.base_steps)


def total_training_flops(config: Config) -> float:
    """FLOPs of the whole run; guides count for the mean share of tokens that they see in the guided steps."""
    guided = config.training.tokens(guided_steps(config)) / config.training.tokens(total_steps(config))
    return total_tokens(config) * (
        guided * training_flops_per_token(config, mean_guide_share(config))
        + (1.0 - guided) * training_flops_per_token(config)
    )


def equal_flops_steps(config: Config, other: Config) -> int:
    """The `training.num_steps` with which a run of `config` costs the training FLOPs of a run of `other`."""
    return max(1, round(total_training_flops(other) / total_training_flops(config) * config.training.base_steps))
