"""The checks that one process can make before any process group exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megastruct.config.checks import check_batch
from megastruct.config.schema import Config
from megastruct.data import TrainingData, open_data
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.options import DataOptions
from megastruct.errors import Problem, UserError
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import check_guided_steps
from megastruct.run.run_folder import RunFolder

T = TypeVar("T")


def preflight(config: Config, world_size: int) -> tuple[Topology, TrainingData]:
    """Check layout, batch, data and run folder for `world_size` processes.

    Raises UserError with all problems.
    """
    problems = list(check_guided_steps(config))
    topology = _collect(
        problems, lambda: Topology.of_world(world_size, config.parallel.pp, config.parallel.dp, config.parallel.tp)
    )
    if topology:
        problems += check_batch(config, topology.dp_size)
    data = _collect(problems, lambda: _open(config))
    if data and topology and not problems:
        _collect(problems, lambda: RunFolder(config).check(data.describe()))
        if not data.validation_is_costly or not problems:
            _collect(problems, lambda: _check_held_out(config, data, topology))
    if problems or topology is None or data is None:
        raise UserError(problems)
    return topology, data


def _collect(problems: list[Problem], function: Callable[[], T]) -> T | None:
    try:
        return function()
    except UserError as error:
        problems += error.problems
        return None


def _open(config: Config) -> TrainingData:
    folder = RunFolder(config)
    commits = folder.described_data().get("hub_commits", ())
    return open_data(DataOptions.of(config, folder.path / FOLDER_NAME, commits))


def _check_held_out(config: Config, data: TrainingData, topology: Topology) -> None:
    if config.evaluation.num_samples:
        data.validation_batches(config.evaluation.num_samples, config.training.micro_batch_size, 0, topology.dp_size)
