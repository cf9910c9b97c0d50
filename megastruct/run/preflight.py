"""The checks that one process can make before any process group exists."""

from __future__ import annotations

from collections.abc import Callable

from megastruct.config.checks import check_batch
from megastruct.config.schema import Config
from megastruct.data import TrainingData, open_data
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.options import DataOptions
from megastruct.errors import Problems
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import check_guided_steps
from megastruct.run.run_folder import RunFolder


def preflight(
    config: Config, world_size: int, report: Callable[[str], None] = lambda _: None
) -> tuple[Topology, TrainingData]:
    """Check layout, batch, data and run folder for `world_size` processes.

    `report` receives lines about the text that is read. Raises UserError with all problems.
    """
    parallel, problems = config.parallel, Problems(check_guided_steps(config))
    topology = problems.collect(lambda: Topology.of_world(world_size, parallel.pp, parallel.dp, parallel.tp))
    if topology:
        problems += check_batch(config, topology.dp_size)
    data = problems.collect(lambda: _open(config, report))
    if data and topology and not problems:
        problems.collect(lambda: RunFolder(config).check(data.describe()))
        if not data.validation_is_costly or not problems:
            problems.collect(lambda: _check_held_out(config, data, topology))
    problems.raise_if_any()
    assert topology and data
    return topology, data


def _open(config: Config, report: Callable[[str], None]) -> TrainingData:
    folder = RunFolder(config)
    begun = folder.described_data()
    column = begun.get("text_column")
    column = column if isinstance(column, str) else None  # a list, if the sources have different ones
    commits = begun.get("hub_commits", ())
    return open_data(DataOptions.of(config, folder.path / FOLDER_NAME, commits, column, report))


def _check_held_out(config: Config, data: TrainingData, topology: Topology) -> None:
    if config.evaluation.num_samples:
        data.validation_batches(config.evaluation.num_samples, config.training.micro_batch_size, 0, topology.dp_size)
