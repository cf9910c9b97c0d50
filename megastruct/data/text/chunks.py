"""Chunks of tokenised documents as they come from whoever makes them, and what is said if nothing comes."""

from __future__ import annotations

import queue
import time

from megastruct.data.read_ahead import ReadAhead, Supply
from megastruct.data.sources.patience import unreachable
from megastruct.data.text.stream import Placed
from megastruct.data.text.worker import Reading, StreamName
from megastruct.errors import Problem, UserError

_LEAST_LIMIT_SECONDS = 60.0  # a chunk of long documents takes seconds, and so does the start of a process


class Signs:
    """What was last heard of the maker of some streams.

    Attributes:
        last_seconds: when, by time.monotonic.
        reading: what each stream reads, and how it failed last.
    """

    def __init__(self) -> None:
        self.last_seconds = time.monotonic()
        self.reading: dict[StreamName, Reading] = {}

    def heard(self, reading: Reading | None = None) -> None:
        self.last_seconds = time.monotonic()
        if reading is not None:
            self.reading[reading.stream] = reading


class Chunks(ReadAhead[list[Placed]]):
    """The tokenised documents of one stream, some at a time.

    Raises:
        UserError: what the stream raises, or nothing was heard of its maker for `limit_seconds`.
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
        """What is said of a source that neither answers nor fails."""
        reading = self.signs.reading.get(self._name)
        if reading is None:
            found = f"stream {self._name[1]} gave no document for {self._limit_seconds:g} s"
            return UserError(Problem("data.path", found, "raise data.patience_seconds, or start again"))
        return unreachable(reading.uri, self._limit_seconds, reading.failure or "it does not answer")


def limit_seconds(patience_seconds: float) -> float:
    """How long a maker may be silent: those that fail say so when their patience ends, this is for those that hang."""
    return max(1.5 * patience_seconds, _LEAST_LIMIT_SECONDS)
