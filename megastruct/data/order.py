"""The order of the data: when and by which rank a sample is consumed, and where it is stored. No I/O, no state.

    global sample index --deal-->    step, data-parallel rank, micro-batch
    global sample index --locate_rows--> epoch, row of the token shards           (kind: tokens)
    global sample index --locate_streams--> virtual stream, row inside that stream (kind: text)

Only `deal`, which hands samples out to ranks, depends on the number of ranks and the micro-batch size. The set of
tokens of step t is therefore the same in every layout of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from megastruct.parallel.seeds import derive_seed

_NUM_ROUNDS = 12
_UINT = np.uint64


def deal(first_sample: int, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """The samples of one rank among [first_sample, first_sample + num_samples), cut into micro-batches.

    A micro-batch is `micro_batch_size` consecutive samples; micro-batches are dealt to the ranks in turn. With another
    dp_size the same micro-batches go to other ranks, so only the order in which their gradients are summed changes.

    Returns:
        int64 [num_samples / (dp_size * micro_batch_size), micro_batch_size], global sample indices.

    Raises:
        ValueError: the samples do not divide evenly, or the rank does not exist.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not in [0, {dp_size})")
    if micro_batch_size < 1 or num_samples < 1 or num_samples % (micro_batch_size * dp_size):
        raise ValueError(
            f"{num_samples} samples do not divide into micro-batches of {micro_batch_size} on {dp_size} ranks"
        )
    samples = first_sample + np.arange(num_samples, dtype=np.int64)
    return samples.reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


class Permutation:
    """A keyed pseudo-random bijection of [0, size) in O(1) memory, for sizes from 1 to 2^62.

    A Feistel network over Z_a x Z_b with a * b just above `size`: each round adds a keyed hash of one half to the
    other half, which is invertible for any hash. An image outside [0, size) is mapped again until it falls inside
    (cycle walking); at most about one value in sqrt(size) is outside. See J. Black and P. Rogaway, "Ciphers with
    arbitrary finite domains", 2002.

    Raises:
        ValueError: the size, or a value in a call, is out of range.
    """

    def __init__(self, size: int, seed: int) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"the size of a permutation must be in [1, 2^62], got {size}")
        self.size = size
        left_size = math.isqrt(size - 1) + 1
        self._left_size = _UINT(left_size)
        self._right_size = _UINT(-(-size // left_size))
        self._keys = [_UINT(derive_seed("feistel", seed, round_index)) for round_index in range(_NUM_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of `indices` (integers in [0, size), any shape) as int64 of the same shape."""
        return self._walk(indices, self._encipher)

    def _walk(self, given: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        values = np.asarray(given)
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise ValueError(f"values must be in [0, {self.size})")
        walked = step(values.astype(_UINT).ravel())
        outside = np.flatnonzero(walked >= self.size)
        while outside.size:
            walked[outside] = step(walked[outside])
            outside = outside[walked[outside] >= self.size]
        return walked.astype(np.int64).reshape(values.shape)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        left: np.ndarray = values % self._left_size
        right: np.ndarray = values // self._left_size
        for round_index, key in enumerate(self._keys):
            if round_index % 2 == 0:
                left = (left + mix(right, key) % self._left_size) % self._left_size
            else:
                right = (right + mix(left, key) % self._right_size) % self._right_size
        return right * self._left_size + left


def mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 on `values` + key, uint64 of any shape: every input bit affects every output bit."""
    mixed = values * _UINT(0x9E3779B97F4A7C15) + key  # array arithmetic wraps modulo 2^64, as intended
    mixed = (mixed ^ (mixed >> _UINT(30))) * _UINT(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> _UINT(27))) * _UINT(0x94D049BB133111EB)
    return mixed ^ (mixed >> _UINT(31))


def locate_rows(samples: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Rows of the unshuffled packing that `samples` (int64, any shape) read; int64 of the same shape.

    Sample i belongs to epoch i // num_rows. Each epoch has its own permutation and reads every row once.
    """
    epochs, offsets = np.divmod(np.asarray(samples, dtype=np.int64), num_rows)
    rows = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        rows[inside] = epoch_permutation(seed, epoch, num_rows)(offsets[inside])
    return rows


def source_seed(seed: int, source: int) -> int:
    """The seed of the order within one source; source 0 uses the seed of the run."""
    return derive_seed("data", "source", seed, source) if source else seed


def epoch_permutation(seed: int, epoch: int, num_rows: int) -> Permutation:
    """The order in which the rows of the token shards are read in one epoch."""
    return Permutation(num_rows, derive_seed("data", "rows", seed, epoch))


def locate_streams(samples: np.ndarray, num_streams: int) -> tuple[np.ndarray, np.ndarray]:
    """(stream, row within the stream) of text samples: streams take turns. Both int64, of the shape of `samples`."""
    rows, streams = np.divmod(np.asarray(samples, dtype=np.int64), num_streams)
    return streams, rows


def rows_consumed(num_samples: int, stream: int, num_streams: int) -> int:
    """Number of rows of `stream` among the global samples [0, num_samples)."""
    return max(0, -(-(num_samples - stream) // num_streams))


def streams_of_rank(
    num_streams: int, first_sample: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[int]:
    """The streams from which a rank can be dealt samples, from `first_sample` on.

    The rank gets micro_batch_size consecutive samples out of every dp_size * micro_batch_size.
    """
    common = math.gcd(num_streams, dp_size * micro_batch_size)
    first_of_rank = first_sample + dp_rank * micro_batch_size
    residues = {(first_of_rank + i) % common for i in range(micro_batch_size)}
    return [stream for stream in range(num_streams) if stream % common in residues]


def default_num_streams(num_shards: int) -> int:
    """The largest power of two up to `num_shards`, at most 64, which bounds open files and buffers per rank."""
    return min(64, 1 << (num_shards.bit_length() - 1))


def shard_order(num_shards: int, stream: int, num_streams: int, seed: int, epoch: int) -> np.ndarray:
    """Indices into the sorted list of shards that `stream` reads in `epoch`, in reading order; int64 [num_shards].

    The set of shards is the same in every epoch (a strided part of one seeded permutation); their order changes.
    """
    shards = Permutation(num_shards, derive_seed("data", "shards", seed))(np.arange(num_shards))
    own = shards[stream::num_streams]
    again = Permutation(len(own), derive_seed("data", "stream", seed, stream, epoch))
    return own[again(np.arange(len(own)))]
