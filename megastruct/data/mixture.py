"""Several sources in one order: which source a global sample comes from, and its index within that source.

    sample:   0  1  2  3  4  5  6  7 ...      weights 3 : 1
    source:   a  b  a  a  a  b  a  a ...      a pattern of `period` samples, repeated
    index:    0  0  1  2  3  1  4  5 ...

In every prefix of the order, each source has its share to within less than one sample. Nothing is random, so there is
no state, and any sample can be located without the samples before it. Pure functions, no I/O.

Within a period, sample j of source k is released at position j * period / counts[k] and due at (j + 1) * period /
counts[k]. Every position takes the released sample that is due first (R. Tijdeman, "The chairman assignment problem",
1980, proves that no source is ever a whole sample away from its share, for any number of sources).
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megastruct.data.order import streams_of_rank

_MAX_PERIOD = 1 << 16
_DUE_BITS = 40
_MAX_SEARCHED = 1 << 20


class Mixture:
    """The weighted interleave of sources; with one source, its order is the global order.

    Attributes:
        num_sources: number of weights.
        names: a name for each source, from its path; see `source_names`.
        period: number of samples after which the order of sources repeats.
        counts: int64 [num_sources], samples of each source per period. Decimal weights are exact if a period of at most
            65,536 samples allows it; otherwise they are rounded to such a period, with at least 1 sample per source.

    Raises:
        ValueError: there is no weight, a weight is not positive and finite, or there are too many sources for a period.
    """

    def __init__(self, weights: Sequence[float], paths: Sequence[str] = ()) -> None:
        """`paths`: of the sources, as the config has them; without them, the sources are numbered."""
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights must be a non-empty list of positive finite numbers, got {list(weights)}")
        self.num_sources = len(weights)
        self.names = source_names(paths) if paths else [str(source) for source in range(len(weights))]
        self.counts = np.array(_counts(weights), dtype=np.int64)
        self.period = int(self.counts.sum())
        self._sources = np.array(_dealt(self.counts.tolist()), dtype=np.int64)  # [period]
        self._indices = np.empty(self.period, dtype=np.int64)  # of each sample of a period within its source
        for source in range(self.num_sources):
            self._indices[self._sources == source] = np.arange(self.counts[source])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index within that source) of global `samples` (int64, any shape); both int64 of the same shape."""
        periods, offsets = np.divmod(np.asarray(samples, dtype=np.int64), self.period)
        sources = self._sources[offsets]
        return sources, periods * self.counts[sources] + self._indices[offsets]

    def consumed(self, num_samples: int) -> np.ndarray:
        """Number of samples of each source among the global samples [0, num_samples); int64 [num_sources]."""
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
        """(source, stream) of all streams from which the rank may be dealt samples. Source k has num_streams[k]."""
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
            # Each cycle advances the source by `step` samples, so only residues modulo `common` can be distinguished.
            step = cycle // self.period * int(self.counts[source])
            common = math.gcd(step, num_streams[source])
            residues = set((indices[sources == source] % common).tolist())
            found += [(source, stream) for stream in range(num_streams[source]) if stream % common in residues]
        return found


def source_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path, all different: as many of its last parts as it takes to tell the paths apart.

    Endings and wildcards are left out: `web/*.parquet` is `web`. If no length tells them apart, all are numbered.
    """
    parts = [_named_parts(path) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{index}" for index, name in enumerate(names, 1)]


def _named_parts(path: str) -> list[str]:
    parts = [re.sub(r"\.(parquet|jsonl?)(\.\w+)?$", "", part) for part in path.split("/")]
    plain = [re.sub(r"[^\w.-]+", "", part).strip(".-_") for part in parts]
    return [part for part in plain if part] or ["data"]


def _counts(weights: Sequence[float]) -> list[int]:
    written = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(written) for weight in written]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _MAX_PERIOD:
        return [int(share * period) for share in shares]
    if len(weights) > _MAX_PERIOD:
        raise ValueError(f"{len(weights)} sources are too many, at most {_MAX_PERIOD} are possible")
    counts = [max(1, int(share * _MAX_PERIOD)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * _MAX_PERIOD)
    for k in by_remainder[: max(0, _MAX_PERIOD - sum(counts))]:
        counts[k] += 1
    return counts


def _dealt(counts: Sequence[int]) -> list[int]:
    """The source of each position of a period; samples that are due at the same position go in the order of sources."""
    period = sum(counts)

    def due_of(source: int) -> int:
        # Different fractions differ by at least 1 / _MAX_PERIOD**2, so these integers are ordered as the fractions are.
        return ((given[source] + 1) << _DUE_BITS) // counts[source]

    given = [0] * len(counts)
    due = [(due_of(source), source) for source in range(len(counts))]  # of the released samples
    heapq.heapify(due)
    later: list[tuple[int, int]] = []  # of the others: (release position, source)
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
