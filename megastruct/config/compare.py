"""Decides which changes of a config let a run continue in its folder, and which a branch of it may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megastruct.config.schema import Config

# Where and how fast the run trains, and how often it evaluates and saves. None of it changes what is trained.
FREE_SECTIONS = ("parallel", "evaluation", "logging", "checkpoint", "hardware", "reliability", "profiling")
FREE_KEYS = (
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.compile",
    "run.folder",
    "data.path",  # from here on: data is compared by its description instead
    "data.tokenizer",
    "data.eod_token",
    "data.bos_token",
    "data.special_tokens_in_text",
    "data.text_column",
    "data.config",
    "data.split",
    "data.validation_split",
    "data.include",
    "data.validation_fraction",
    "data.num_streams",
    "data.num_workers",
    "data.patience_seconds",
    "data.token_cache",
)
# What may change when a run is made longer, and only then.
LENGTH_KEYS = ("training.num_steps", "training.num_tokens", "schedule.num_steps")
# What a branch shares with its parent: the shapes of the weights, and what they compute.
SHARED_SECTIONS = ("model", "ffn")
FREE_IN_A_BRANCH = ("model.init_std",)
# Where a branch goes on at its parent's place in the data, the order of the data is shared, too.
SHARED_ORDER = ("run.seed", "training.seq_length")

Change = tuple[str, object, object]  # key, old value, new value


def changes_of_the_run(old: Config, new: Config) -> list[Change]:
    """Every key whose change makes `new` another run than `old`; none if `new` only makes the run longer."""
    changes = [
        change
        for change in _changes(old, new)
        if change[0] not in FREE_KEYS and change[0].partition(".")[0] not in FREE_SECTIONS
    ]
    if {path for path, _, _ in changes} <= {*LENGTH_KEYS} and extension(old, new):
        return []
    return changes


class Extension(NamedTuple):
    """A run that is made longer: steps before and after, and the number of steps that its schedule had and has."""

    old_steps: int
    new_steps: int
    old_schedule_steps: int
    schedule_steps: int

    @property
    def schedule(self) -> str:
        """continued: the schedule is as it was; stretched or shortened: its length is another one."""
        if self.schedule_steps == self.old_schedule_steps:
            return "continued"
        return "stretched" if self.schedule_steps > self.old_schedule_steps else "shortened"


def extension(old: Config, new: Config) -> Extension | None:
    """How `new` makes the run of `old` longer; None if it does not.

    A run with guides cannot be made longer, because its phases follow from its length.
    """
    steps = (old.training.base_steps, new.training.base_steps)
    if new.guided.schedule != "off" or steps[1] <= steps[0]:
        return None
    return Extension(*steps, old.schedule.num_steps or steps[0], new.schedule.num_steps or steps[1])


def changes_of_a_branch(parent: Config, branch: Config) -> list[Change]:
    """Every key in which a branch differs from its parent and may not."""
    shared = [*SHARED_ORDER] if branch.run.inherits_place else []
    return [
        change
        for change in _changes(parent, branch)
        if change[0] in shared or (change[0].partition(".")[0] in SHARED_SECTIONS and change[0] not in FREE_IN_A_BRANCH)
    ]


def _changes(old: Config, new: Config) -> Iterator[Change]:
    old_values, new_values = old.model_dump(), new.model_dump()
    for section, values in new_values.items():
        for key in values | old_values[section]:  # structures differ in their sizes
            before, value = old_values[section].get(key), values.get(key)
            if value != before:
                yield f"{section}.{key}", before, value
