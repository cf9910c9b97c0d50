"""Checks of the course of a training: batch sizes, schedule, branches, validation and checkpoints."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator

from megastruct.config.batch_sizes import BatchRamp
from megastruct.config.schedules import SCHEDULES
from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.parallel.sizes import nearest_divisor


def check_batch_warmup(config: Config) -> Iterator[Problem]:
    """Batch sizes that grow up to `global_batch_size`, over exactly one length each, and no data that is read again."""
    training, where = config.training, "training.batch_size_warmup"
    warmup, full = training.batch_size_warmup, training.global_batch_size
    if warmup is None:
        return
    stages = (warmup,) if isinstance(warmup, BatchRamp) else warmup
    for stage in stages:
        if (stage.num_steps is None) == (stage.num_tokens is None):
            found = (
                "num_steps and num_tokens are both set" if stage.num_steps else "has neither num_steps nor num_tokens"
            )
            yield Problem(where, found, "set exactly one of them")
    sizes = [stage.start if isinstance(stage, BatchRamp) else stage.batch_size for stage in stages] + [full]
    if any(size >= later for size, later in itertools.pairwise(sizes)):
        found = f"{', '.join(map(str, sizes))} (the last is training.global_batch_size) do not grow"
        yield Problem(where, found, "batch sizes that grow and stay below training.global_batch_size")
    elif isinstance(warmup, BatchRamp) and (full - warmup.start) % (increment := warmup.increment or warmup.start):
        found = f"increments of {increment} do not lead from {warmup.start} to training.global_batch_size = {full}"
        yield Problem(where, found, f"increment: {nearest_divisor(full - warmup.start, increment)}")
    if config.guided.schedule == "fixedflop":
        found = "set with guided.schedule = fixedflop, which reads the data of its first steps again in equal steps"
        yield Problem(where, found, "guided.schedule=fixedstep, or no training.batch_size_warmup")


def check_schedule(config: Config) -> Iterator[Problem]:
    """A known schedule, only its own keys, and one length of each part."""
    schedule = config.schedule
    if schedule.kind not in SCHEDULES:
        meant = difflib.get_close_matches(schedule.kind, SCHEDULES, n=1, cutoff=0.0)[0]
        found = f"{schedule.kind!r} is none of {', '.join(map(repr, SCHEDULES))}"
        yield Problem("schedule.kind", found, f"schedule.kind={meant}")
        return
    for key in sorted({key for other in SCHEDULES.values() for key in other.keys} - {*SCHEDULES[schedule.kind].keys}):
        if (value := getattr(schedule, key)) is not None:
            owners = " or ".join(name for name, other in SCHEDULES.items() if key in other.keys)
            found = f"{value}, but schedule.kind is {schedule.kind}"
            yield Problem(f"schedule.{key}", found, f"schedule.kind={owners}, or no schedule.{key}")
    if schedule.decay_fraction is not None and schedule.decay_steps is not None:
        found = "set together with schedule.decay_steps"
        yield Problem("schedule.decay_fraction", found, "set one of them")


def check_branch(config: Config) -> Iterator[Problem]:
    """What a branch takes over needs a run to branch from."""
    if config.run.from_ is None and config.run.inherit != "weights":
        found = f"{config.run.inherit}, but there is no run.from"
        yield Problem("run.inherit", found, "run.from=FOLDER@STEP, or no run.inherit")


def check_validation(config: Config) -> Iterator[Problem]:
    """Further validation data has a size."""
    evaluation = config.evaluation
    if evaluation.sources and not evaluation.num_samples:
        found = "0 with evaluation.sources: there would be no validation"
        yield Problem("evaluation.num_samples", found, f"evaluation.num_samples={config.training.global_batch_size}")


def check_checkpoints(config: Config) -> Iterator[Problem]:
    """Checkpoints that are kept for ever must be saved at all."""
    interval, every = config.checkpoint.interval_steps, config.checkpoint.keep_every
    if every and (not interval or every % interval):
        found = f"{every} is not a multiple of checkpoint.interval_steps = {interval}"
        above = (every // interval + 1) * interval if interval else 0
        suggestion = f"checkpoint.keep_every={above}" if interval else f"checkpoint.interval_steps={every}"
        yield Problem("checkpoint.keep_every", found, suggestion)


TRAINING_CHECKS = (check_batch_warmup, check_schedule, check_branch, check_validation, check_checkpoints)
