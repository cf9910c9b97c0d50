"""Everything that can be wrong and be seen from one process, before any process group exists."""

from __future__ import annotations

from megastruct.config.schema import Config
from megastruct.data import open_data
from megastruct.data.text_data import TextData
from megastruct.data.token_data import TokenData
from megastruct.errors import Problem, UserError
from megastruct.parallel.topology import Topology
from megastruct.training.run_folder import check_run_folder

Data = TokenData | TextData


def preflight(config: Config, world_size: int) -> tuple[Topology, Data]:
    """Check layout, data and run folder for `world_size` processes. Raises UserError with what is wrong."""
    topology = Topology.of_world(world_size, config.parallel.pp, config.parallel.dp)
    _check_batch(config, topology.dp_size)
    data = open_data(
        config.data.kind,
        config.data.path,
        config.data.tokenizer,
        seq_length=config.training.seq_length,
        vocab_size=config.model.vocab_size,
        seed=config.run.seed,
        text_column=config.data.text_column,
        validation_fraction=config.data.validation_fraction,
        num_streams=config.data.num_streams,
    )
    if isinstance(data, TokenData) and config.evaluation.num_samples:  # text would have to be read for it
        data.validation_batches(config.evaluation.num_samples, config.training.micro_batch_size, 0, topology.dp_size)
    check_run_folder(config, data.describe())
    return topology, data


def _check_batch(config: Config, dp_size: int) -> None:
    share = config.training.micro_batch_size * dp_size
    problems = [
        Problem(
            key,
            f"{value} is no multiple of micro_batch_size {config.training.micro_batch_size} x {dp_size} replicas",
            f"{key}={max(share, value // share * share)}",
        )
        for key, value in (
            ("training.global_batch_size", config.training.global_batch_size),
            ("evaluation.num_samples", config.evaluation.num_samples),
        )
        if value % share
    ]
    if problems:
        raise UserError(problems, headline=f"{dp_size} replicas do not divide the batch")
