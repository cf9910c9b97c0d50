"""Everything that can be wrong and be seen from one process, before any process group exists."""

from __future__ import annotations

from megastruct.config.checks import check_batch
from megastruct.config.schema import Config
from megastruct.data import open_data
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.text.data import TextData
from megastruct.data.tokens.data import TokenData
from megastruct.errors import Problems
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import check_guided_steps
from megastruct.run.run_folder import check_run_folder, described_data, run_folder

Data = TokenData | TextData


def preflight(config: Config, world_size: int) -> tuple[Topology, Data]:
    """Check layout, batch, data and run folder for `world_size` processes.

    Raises UserError with all that is wrong.
    """
    parallel, problems = config.parallel, Problems(check_guided_steps(config))
    topology = problems.collect(lambda: Topology.of_world(world_size, parallel.pp, parallel.dp, parallel.tp))
    if topology:
        problems += check_batch(config, topology.dp_size)
    data = problems.collect(lambda: _open(config))
    if data and topology and not problems:
        problems.collect(lambda: check_run_folder(config, data.describe()))
        if isinstance(data, TokenData) or not problems:  # of text much may have to be read for it
            problems.collect(lambda: _check_held_out(config, data, topology))
    problems.raise_if_any()
    assert topology and data
    return topology, data


def _open(config: Config) -> Data:
    return open_data(
        config.data.kind,
        config.data.path if isinstance(config.data.path, str) else config.data.sources,
        config.data.tokenizer,
        seq_length=config.training.seq_length,
        vocab_size=config.model.vocab_size,
        seed=config.run.seed,
        text_column=config.data.text_column,
        validation_fraction=config.data.validation_fraction,
        num_streams=config.data.num_streams,
        num_workers=config.data.num_workers,
        patience_seconds=config.data.patience_seconds,
        cache_folder=run_folder(config) / FOLDER_NAME,
        hub_commits=described_data(config).get("hub_commits", ()),
    )


def _check_held_out(config: Config, data: Data, topology: Topology) -> None:
    if config.evaluation.num_samples:
        data.validation_batches(config.evaluation.num_samples, config.training.micro_batch_size, 0, topology.dp_size)
