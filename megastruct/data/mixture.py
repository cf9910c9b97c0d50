"""Several sources in one order: which source a global sample comes from, and which of its own samples it is.

    sample:   0  1  2  3  4  5  6  7 ...      weights 3 : 1
    source:   a  b  a  a  a  b  a  a ...      a pattern of `period` samples, repeated
    its own:  0  0  1  2  3  1  4  5 ...

Every prefix of the order has each source's share to less than one sample; nothing is drawn, so nothing is kept, and
any sample is found without those before it. Pure functions, no I/O.

Source k's sample j of a period may come from position j * period / counts[k] on, and is due at (j + 1) * period /
counts[k]; every position is given to the sample that is due first among those that may come (R. Tijdeman, "The chairman
assignment problem", 1980: no source is ever a whole sample from its share, however many there are).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megastruct.data.order import streams_of_rank

_MAX_PERIOD = 1 << 16
_DUE_BITS = 40
_MAX_SEARCHED = 1 << 20


class Mixture:
    """The weighted interleave of sources; with one source every sample is its own.

    Attributes:
        num_sources: how many weights there are.
        period: the order of sources repeats after so many samples.
        counts: int64 [num_sources], samples of each source in a period. Exact shares of the weights as they are written
            in decimals if a period of at most 65,536 samples allows it, else rounded to it, with at least 1.

    Raises:
        ValueError: there is no weight, one is not positive and finite, or one rounds to more sources than a period has.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"positive weights are wanted, got {list(weights)}")
        self.num_sources = len(weights)
        self.counts = np.array(_counts(weights), dtype=np.int64)
        self.period = int(self.counts.sum())
        self._sources = np.array(_dealt(self.counts.tolist()), dtype=np.int64)  # [period]
        self._indices = np.empty(self.period, dtype=np.int64)  # of each sample of a period among those of its source
        for source in range(self.num_sources):
            self._indices[self._sources == source] = np.arange(self.counts[source])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample of that source) of global `samples` (int64, any shape); both int64 of that shape."""
        periods, offsets = np.divmod(np.asarray(samples, dtype=np.int64), self.period)
        sources = self._sources[offsets]
        return sources, periods * self.counts[sources] + self._indices[offsets]

    def consumed(self, num_samples: int) -> np.ndarray:
        """How many samples of each source are among the global samples [0, num_samples); int64 [num_sources]."""
        periods, offset = divmod(num_samples, self.period)
        return periods * self.counts + np.bincount(self._sources[:offset], minlength=self.num_sources)

    def most_samples(self, limits: Sequence[int]) -> int:
        """The largest number of global samples that take at most limits[k] samples of each source k."""
        low, high = 0, (min(limits) + 1) * self.period
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (self.consumed(middle) <= limits).all() else (low, middle - 1)
        return low

    def streams_of_rank(
        self, num_streams: Sequence[int], first_sample: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[tuple[int, int]]:
        """(source, stream) of all streams from which a rank may be dealt a sample; source k has num_streams[k]."""
        if self.num_sources == 1:
            own = streams_of_rank(num_streams[0], first_sample, micro_batch_size, dp_rank, dp_size)
            return [(0, stream) for stream in own]
        share = dp_size * micro_batch_size
        cycle = math.lcm(self.period, share)
        if cycle > _MAX_SEARCHED:
            return [(source, stream) for source in range(self.num_sources) for stream in range(num_streams[source])]
        samples = np.arange(cycle)
        own_samples = first_sample + samples[samples // micro_batch_size % dp_size == dp_rank]
        sources, indices = self.locate(own_samples)
        found = []
        for source in range(self.num_sources):
            # After a cycle each source has advanced by `step`, so that only residues modulo `common` are told apart.
            step = cycle // self.period * int(self.counts[source])
            common = math.gcd(step, num_streams[source])
            residues = set((indices[sources == source] % common).tolist())
            found += [(source, stream) for stream in range(num_streams[source]) if stream % common in residues]
        return found


def _counts(weights: Sequence[float]) -> list[int]:
    written = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(written) for weight in written]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _MAX_PERIOD:
        return [int(share * period) for share in shares]
    if len(weights) > _MAX_PERIOD:
        raise ValueError(f"{len(weights)} sources are more than {_MAX_PERIOD}")
    counts = [max(1, int(share * _MAX_PERIOD)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * _MAX_PERIOD)
    for k in by_remainder[: max(0, _MAX_PERIOD - sum(counts))]:
        counts[k] += 1
    return counts


def _dealt(counts: Sequence[int]) -> list[int]:
    """The source of each position of a period; of equal claims the first source's goes first."""
    period = sum(counts)

    def due_of(source: int) -> int:
        # Different fractions differ by at least 1 / _MAX_PERIOD**2, so that their order is that of these numbers.
        return ((given[source] + 1) << _DUE_BITS) // counts[source]

    given = [0] * len(counts)
    due = [(due_of(source), source) for source in range(len(counts))]  # of the samples that may come
    heapq.heapify(due)
    later: list[tuple[int, int]] = []  # of the others: (first position, source)
    sources = []
    for position in range(period):
        while later and later[0][0] <= position:
            _, source = heapq.heappop(later)
            heapq.heappush(due, (due_of(source), source))
        _, source = heapq.heappop(due)
        sources.append(source)
        given[source] += 1
        heapq.heappush(later, (-(-given[source] * period // counts[source]), source))
    return sources
