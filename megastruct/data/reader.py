"""The base class of readers: deals samples to its rank, step by step, and counts what the run has consumed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.mixture import Mixture
from megastruct.data.order import deal
from megastruct.errors import Problem, UserError


class Reader(ABC, Iterator[Batch]):
    """An endless iterator of this rank's micro-batches, from global sample `start_sample` on.

    A step takes `global_batch_size` samples; this rank gets global_batch_size / (dp_size * micro_batch_size)
    micro-batches of them.

    Raises:
        ValueError: the sizes do not divide evenly (the checks of the config report this to the user earlier).
    """

    def __init__(
        self, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, start_sample: int
    ) -> None:
        deal(start_sample, global_batch_size, micro_batch_size, dp_rank, dp_size)  # raises for bad sizes
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._next_step_sample = start_sample
        self._micro_batches: deque[np.ndarray] = deque()  # rest of the current step, int64 [micro_batch] each

    def __next__(self) -> Batch:
        if not self._micro_batches:
            self._micro_batches.extend(self._next_step())
            self._next_step_sample += self._global_batch_size
        return batch_from_rows(self._read(self._micro_batches.popleft()))

    @property
    def is_between_steps(self) -> bool:
        """Whether no micro-batch of the current step is left."""
        return not self._micro_batches

    def samples_consumed(self) -> int:
        """Number of global samples that all ranks have consumed; defined between steps only.

        Raises:
            RuntimeError: micro-batches of the current step are left.
        """
        if self._micro_batches:
            raise RuntimeError(f"{len(self._micro_batches)} micro-batches of the current step are not consumed yet")
        return self._next_step_sample

    @property
    @abstractmethod
    def skipped_documents(self) -> int:
        """Number of broken documents that this rank has skipped so far."""

    @abstractmethod
    def cursor(self) -> np.ndarray:
        """The next unconsumed sample, int64 [num_streams, columns]; to be taken between steps.

        Streams that this rank does not own are rows of -1: of all ranks' values the largest is the known one.
        """

    @abstractmethod
    def _read(self, places: np.ndarray) -> np.ndarray:  # one entry of `_next_step`
        """Rows int64 [micro_batch, seq_length + 1] of one micro-batch of `_next_step`."""

    def _next_step(self) -> np.ndarray:
        """One entry per sample of this rank in the next step, int64 [num_micro_batches, micro_batch, ...]."""
        return self._deal(self._next_step_sample)

    def _deal(self, first_sample: int) -> np.ndarray:
        return deal(first_sample, self._global_batch_size, self._micro_batch_size, self._dp_rank, self._dp_size)


def describe_mixture(mixture: Mixture, parts: list[dict]) -> dict:
    """What the record of a run says of several sources, beside their sums; nothing for one."""
    if mixture.num_sources == 1:
        return {}
    shares = [{"samples": count, **part} for count, part in zip(mixture.counts.tolist(), parts, strict=True)]
    return {"mixture": json.dumps({"period": mixture.period, "sources": shares})}


def check_held_out_rows(
    mixture: Mixture, num_rows: list[int], num_samples: int, batch_size: int, validation_fraction: float
) -> None:
    """Raise UserError if `num_samples` rows take more of a source than its held-out documents fill (`num_rows`).

    `batch_size`: rows of one micro-batch on all replicas, of which `num_samples` must be a multiple.
    """
    if (mixture.consumed(num_samples) <= num_rows).all():
        return
    most = mixture.most_samples(num_rows)
    whole = most // batch_size * batch_size
    found = f"{num_samples} validation rows are requested, but the held-out documents fill only {most}"
    if whole:
        suggestion = f"set it to {whole} or less, or "
    else:
        found += f", less than one micro-batch on all replicas ({batch_size} rows)" if most else ""
        suggestion = "set it to 0 for no validation, "
        suggestion += "choose a smaller training.micro_batch_size, or " if most else "or "
    suggestion += f"hold out more documents (the validation fraction is {validation_fraction})"
    raise UserError(Problem("evaluation.num_samples", found, suggestion))


def rows_of_sources(mixture: Mixture, samples: np.ndarray) -> dict[str, np.ndarray]:
    """For each source by its name, which of the global `samples` come from it: bool, of the shape of `samples`."""
    sources, _ = mixture.locate(samples)
    return {name: sources == source for source, name in enumerate(mixture.names)}


def validation_samples(num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Held-out rows of this rank, dealt as in training: int64 [num_micro_batches, micro_batch].

    Raises:
        ValueError: num_samples is not divisible by micro_batch_size * dp_size.
    """
    return deal(0, num_samples, micro_batch_size, dp_rank, dp_size)
