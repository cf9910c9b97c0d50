"""The micro-batches that the step benchmark trains on: random tokens, or the data of the config."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.profiler import record_function

from megastruct.config.schema import Config
from megastruct.data import Batch, TrainingData
from megastruct.data.batch import batch_from_rows
from megastruct.data.open import open_data
from megastruct.data.options import DataOptions
from megastruct.profiling.parts import DATA_RANGE

NUM_BATCHES = 16  # random ones, which are repeated


class Share(NamedTuple):
    """Which part of the global batches a rank reads: replica `rank` of `size`, so many rows at a time."""

    rank: int
    size: int
    micro_batch_size: int


class Tokens:
    """Where the micro-batches come from. `eod_id`: the token that ends a document."""

    def __init__(self, config: Config, data: TrainingData | None) -> None:
        """Without `data`, tokens are random."""
        self._config, self._data = config, data
        self.eod_id = data.tokenizer.eod_id if data else 0

    @property
    def name(self) -> str:
        """`data` or `synthetic`, as in the option."""
        return "data" if self._data else "synthetic"

    def read(self, share: Share) -> Iterator[Batch]:
        """Endless micro-batches of a replica, from the beginning, on the CPU; waiting for one has a name in traces."""
        training = self._config.training
        batches = (
            self._data.train_reader(training.global_batch_size, share.micro_batch_size, share.rank, share.size)
            if self._data
            else cycle(_random(self._config, share))
        )
        while True:
            with record_function(DATA_RANGE):
                batch = next(batches)
            yield batch


def open_tokens(config: Config, synthetic: bool, cache: Path) -> Tokens:
    """Find and check the data of the config, unless tokens are `synthetic`. `cache`: a folder for what is found.

    Raises UserError if data is missing, damaged or does not fit the config.
    """
    return Tokens(config, None if synthetic else open_data(DataOptions.of(config, cache)))


def _random(config: Config, share: Share) -> list[Batch]:
    """The same on all ranks of a tensor-parallel group and on all stages, other ones for each replica."""
    draw = np.random.default_rng((config.run.seed, share.rank))
    shape = (NUM_BATCHES, share.micro_batch_size, config.training.seq_length + 1)
    return [batch_from_rows(rows) for rows in draw.integers(0, config.model.vocab_size, shape)]
