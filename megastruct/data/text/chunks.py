"""Chunks of tokenised documents as they arrive from their maker, and the error if nothing arrives."""

from __future__ import annotations

import queue
import time

from megastruct.data.read_ahead import ReadAhead, Supply
from megastruct.data.sources.patience import unreachable
from megastruct.data.text.stream import Placed
from megastruct.data.text.worker import Reading, StreamName
from megastruct.errors import Problem, UserError

_LEAST_LIMIT_SECONDS = 60.0  # a chunk of long documents, or the start of a process, takes seconds


class Signs:
    """The last signs of life from the maker of some streams.

    Attributes:
        last_seconds: the time of the last sign, by time.monotonic.
        reading: the shard that each stream reads, and its last failure.
    """

    def __init__(self) -> None:
        self.last_seconds = time.monotonic()
        self.reading: dict[StreamName, Reading] = {}

    def heard(self, reading: Reading | None = None) -> None:
        """Note a sign of life now, with what a stream reads if that is known."""
        self.last_seconds = time.monotonic()
        if reading is not None:
            self.reading[reading.stream] = reading


class Chunks(ReadAhead[list[Placed]]):
    """The tokenised documents of one stream, a list at a time.

    Raises:
        UserError: the stream raised it, or its maker gave no sign of life for `limit_seconds(patience_seconds)`.
    """

    def __init__(
        self, supply: Supply[list[Placed]], num_ahead: int, name: StreamName, signs: Signs, patience_seconds: float
    ) -> None:
        super().__init__(supply, num_ahead)
        self._name, self.signs = name, signs
        self._limit_seconds = limit_seconds(patience_seconds)

    def _wait(self) -> list[Placed] | BaseException:
        waiting_since = time.monotonic()
        while True:
            last_seconds = max(waiting_since, self.signs.last_seconds)
            left_seconds = last_seconds + self._limit_seconds - time.monotonic()
            try:
                return self.made.get(timeout=max(0.0, left_seconds))
            except queue.Empty:
                if self.signs.last_seconds <= last_seconds:
                    return self._silent()

    def _silent(self) -> UserError:
        """The error for a source that neither answers nor fails."""
        reading = self.signs.reading.get(self._name)
        if reading is None:
            found = f"stream {self._name[1]} delivered no document for {self._limit_seconds:g} s"
            return UserError(Problem("data.path", found, "raise data.patience_seconds, or start again"))
        why = f"last error: {reading.failure}" if reading.failure else "it does not answer"
        return unreachable(reading.uri, self._limit_seconds, why)


def limit_seconds(patience_seconds: float) -> float:
    """Seconds after which a silent maker counts as hanging: 1.5 x patience, at least 60.

    A maker that fails reports it itself when its patience is over, which is earlier.
    """
    return max(1.5 * patience_seconds, _LEAST_LIMIT_SECONDS)
