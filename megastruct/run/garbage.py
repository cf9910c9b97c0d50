"""Python's collector of cyclic garbage, which holds up a process for as long as it searches.

By itself it searches in every process at moments of its own, and in each step all ranks wait for the one that is
searching. So it is turned off after the first step of a process, and every rank collects after the same steps. What
exists by then (modules, the model, the engine) is not searched again, which makes a collection short.
"""

from __future__ import annotations

import gc
from types import TracebackType


class AlignedCollection:
    """A context in which garbage is collected after every `interval_steps` steps; 0 leaves Python's own way alone."""

    def __init__(self, interval_steps: int) -> None:
        self._interval_steps = interval_steps
        self._all_is_searched = True

    def __enter__(self) -> AlignedCollection:
        if self._interval_steps:
            gc.freeze()  # the modules, which are most of all objects: the first collection is short, too
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._interval_steps:
            gc.unfreeze()
            gc.enable()

    def finished(self, step: int) -> None:
        """Collect if it is time, after `step` finished steps of the run."""
        if not self._interval_steps or (step % self._interval_steps and not self._all_is_searched):
            return
        gc.collect()
        if self._all_is_searched:
            gc.freeze()
            gc.disable()
            self._all_is_searched = False

    def search_all(self) -> None:
        """Have the next collection search everything: before an engine is given up, which is full of cycles."""
        if self._interval_steps:
            gc.unfreeze()
            self._all_is_searched = True
