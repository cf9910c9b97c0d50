"""A thread that reads micro-batches ahead, so that the trainer does not wait for a file system."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megastruct.data.batch import Batch
from megastruct.data.read_ahead import Maker, ReadAhead
from megastruct.data.reader import Reader

MICRO_BATCHES_AHEAD = 4


class Prefetched(Iterator[Batch]):
    """The micro-batches of `reader` in order, at most `MICRO_BATCHES_AHEAD` of them read ahead.

    An error of the reader is raised in place of the micro-batch that failed, and again by every later call.
    """

    def __init__(self, reader: Reader) -> None:
        self._cursor: np.ndarray | None = reader.cursor()
        self._read = ReadAhead(Maker(self, "prefetch").supply(_with_cursors(reader)), MICRO_BATCHES_AHEAD)
        self._read.begin()

    def __next__(self) -> Batch:
        batch, self._cursor = next(self._read)
        return batch

    def cursor(self) -> np.ndarray:
        """The reader's cursor after the micro-batch that was taken last.

        Raises:
            RuntimeError: micro-batches of the current step are left.
        """
        if self._cursor is None:
            raise RuntimeError("micro-batches of the current step are not consumed yet")
        return self._cursor


def _with_cursors(reader: Reader) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Each micro-batch with the reader's cursor after it; the cursor is None within a step."""
    for batch in reader:
        yield batch, reader.cursor() if reader.is_between_steps else None
