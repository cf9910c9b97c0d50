"""The checks that one process can make before any process group exists."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megastruct.config.checks import check_batch
from megastruct.config.schema import Config
from megastruct.data import TrainingData, open_data
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.options import DataOptions
from megastruct.errors import Problems
from megastruct.launch.environment import processes_on_this_node
from megastruct.metrics.wandb_writer import check_wandb
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import check_guided_steps
from megastruct.profiling.check import profiling_problems
from megastruct.run.branch import begins_as_branch, check_parent
from megastruct.run.restore import Restore
from megastruct.run.run_folder import RunFolder
from megastruct.run.summary import check_memory
from megastruct.run.validation import open_sources


def preflight(
    config: Config,
    world_size: int,
    processes_here: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[Topology, TrainingData]:
    """Check layout, batch, packages, data and run folder for `world_size` processes.

    `processes_here`: how many of them share the memory of this machine; None: what their launcher says, else all; 0: it
    runs elsewhere. `report` receives lines about the text that is read. Raises UserError with all problems.
    """
    parallel, problems = config.parallel, Problems(check_guided_steps(config))
    here = processes_on_this_node(world_size) if processes_here is None else processes_here
    problems += check_wandb(config)
    problems += profiling_problems(config, world_size, _device_type(config) if here else None)
    topology = problems.collect(lambda: Topology.of_world(world_size, parallel.pp, parallel.dp, parallel.tp))
    if topology:
        problems += check_batch(config, topology.dp_size)
    if topology and here and not problems:
        problems += check_memory(config, topology, _device_type(config), here)
    restore = problems.collect(lambda: _restored_files(config))
    data = problems.collect(lambda: _open(config, report))
    if data and topology and not problems:
        folder = RunFolder(config)
        problems.collect(lambda: folder.check(data.describe()))
        if begins_as_branch(folder):
            problems.collect(lambda: check_parent(config, data))
        problems.collect(lambda: open_sources(config, data))
        if not data.validation_is_costly or not problems:
            problems.collect(lambda: _check_held_out(config, data, topology))
    problems.raise_if_any()
    assert topology and data and restore
    restore.checkpoint()
    return topology, data


def _device_type(config: Config) -> str:
    return "cuda" if config.hardware.device != "cpu" and torch.cuda.is_available() else "cpu"


def _restored_files(config: Config) -> Restore:
    """The rest of the restoration, after the files of the run that the other checks need."""
    restore = Restore(config)
    restore.files()
    return restore


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
