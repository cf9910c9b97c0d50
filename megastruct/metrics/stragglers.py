"""Which rank is the slowest, and in which part of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import NamedTuple

# A rank that works this many times as long as the median one is worth a word in a log.
NOTABLE = 1.5


class Parts(NamedTuple):
    """The parts of a rank's training step, in seconds per step: they add up to the time of the step.

    While a rank waits for its data or for other ranks, a GPU may still compute; `compute` is what is left.
    """

    compute: float
    data_wait: float
    waiting: float  # communication, and waiting for other ranks

    @property
    def work(self) -> float:
        """The rank's own part: what it would take if the others were never late."""
        return self.compute + self.data_wait


def slowest(ranks: Sequence[Parts]) -> dict[str, float]:
    """The rank with the most work of its own, its parts and the medians over all ranks, by metric name.

    Empty for one rank alone. The median of an even number of ranks is the smaller one of the two in the middle.
    """
    if len(ranks) == 1:
        return {}
    rank = max(range(len(ranks)), key=lambda rank: ranks[rank].work)
    return {
        "slowest_rank": rank,
        "slowest_compute_seconds": ranks[rank].compute,
        "slowest_data_wait_seconds": ranks[rank].data_wait,
        "slowest_waiting_seconds": ranks[rank].waiting,
        "median_compute_seconds": median_low(parts.compute for parts in ranks),
        "median_data_wait_seconds": median_low(parts.data_wait for parts in ranks),
    }


def notable(metrics: Mapping[str, float | None]) -> str:
    """What a log should say of the slowest rank in a record, and of the part that it loses most in; mostly nothing."""
    names = ("slowest_compute", "slowest_data_wait", "median_compute", "median_data_wait")
    values = [metrics.get(f"{name}_seconds") for name in names]
    compute, data, median_compute, median_data = [value or 0.0 for value in values]
    if None in values or compute + data <= NOTABLE * (median_compute + median_data):
        return ""
    in_data = data - median_data > compute - median_compute
    part, own, median = ("data wait", data, median_data) if in_data else ("compute", compute, median_compute)
    return f"slowest rank {metrics['slowest_rank']:.0f}: {part} {own:.3g} s, median {median:.3g} s"
