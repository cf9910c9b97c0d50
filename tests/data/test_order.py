"""The order of samples against plain references, and the permutation against arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastruct.data.order import (
    Permutation,
    deal,
    default_num_streams,
    locate_rows,
    rows_consumed,
    shard_order,
    streams_of_rank,
)
from slow_order import inverse


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 99, 100, 101, 1000, 65537])
def test_permutation_visits_every_index_once(size):
    images = Permutation(size, seed=3)(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=200, deadline=None)
def test_permutation_can_be_undone_at_any_size(size, seed, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    permutation = Permutation(size, seed)
    images = permutation(indices)
    assert images.dtype == np.int64 and images.min() >= 0 and images.max() < size
    np.testing.assert_array_equal(inverse(permutation, images), indices)
    np.testing.assert_array_equal(permutation(inverse(permutation, indices)), indices)


def test_permutation_mixes():
    """Fixed points of a random permutation are about one; neighbours land far apart; seeds are unrelated."""
    size = 100_000
    images = Permutation(size, seed=0)(np.arange(size))
    assert (images == np.arange(size)).sum() < 10
    assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 0.01  # mean distance of two random points
    assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 0.02
    other = Permutation(size, seed=1)(np.arange(size))
    assert (images == other).sum() < 10


def test_permutations_of_four_are_all_about_equally_likely():
    counts = {}
    for seed in range(2400):
        key = tuple(Permutation(4, seed)(np.arange(4)).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == math.factorial(4)
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 60  # chi-square, 23 degrees: p < 1e-4


def test_the_order_is_pinned():
    """A change here makes every checkpoint resume on other tokens."""
    assert Permutation(10, seed=7)(np.arange(10)).tolist() == PINNED_PERMUTATION
    assert locate_rows(np.array([0, 1, 2, 999, 1000, 123_456_789]), 1000, seed=5).tolist() == PINNED_ROWS


PINNED_PERMUTATION = [8, 9, 7, 2, 5, 3, 4, 0, 1, 6]
PINNED_ROWS = [428, 659, 707, 616, 900, 872]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 13])
def test_every_row_once_per_epoch(num_rows):
    samples = np.arange(4 * num_rows)
    rows = locate_rows(samples, num_rows, seed=11).reshape(4, num_rows)
    for epoch_rows in rows:
        assert sorted(epoch_rows.tolist()) == list(range(num_rows))
    # a batch that straddles epochs reads the same rows as one sample at a time
    one_by_one = [int(locate_rows(np.array([sample]), num_rows, seed=11)[0]) for sample in samples]
    assert one_by_one == rows.ravel().tolist()


def test_epochs_differ():
    rows = locate_rows(np.arange(300), 100, seed=0).reshape(3, 100)
    assert (rows[0] != rows[1]).any() and (rows[1] != rows[2]).any()


@pytest.mark.parametrize("first_sample", [0, 24, 31])
@pytest.mark.parametrize("micro_batch_size, dp_size", [(1, 1), (2, 3), (3, 4), (12, 2), (4, 6)])
def test_deal_equals_a_loop(first_sample, micro_batch_size, dp_size):
    for rank in range(dp_size):
        expected = [first_sample + i for i in range(24) if i // micro_batch_size % dp_size == rank]
        dealt = deal(first_sample, 24, micro_batch_size, rank, dp_size)
        assert dealt.shape == (24 // dp_size // micro_batch_size, micro_batch_size)
        assert dealt.ravel().tolist() == expected


@pytest.mark.parametrize("arguments", [(0, 24, 5, 0, 1), (0, 24, 2, 0, 5), (0, 24, 2, 2, 2), (0, 0, 1, 0, 1)])
def test_deal_refuses_what_does_not_divide(arguments):
    with pytest.raises(ValueError):
        deal(*arguments)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_micro_batches_are_the_same_for_every_number_of_ranks(dp_size):
    alone = deal(48, 24, 2, 0, 1).tolist()
    dealt = [micro_batch for rank in range(dp_size) for micro_batch in deal(48, 24, 2, rank, dp_size).tolist()]
    assert sorted(dealt) == alone


@pytest.mark.parametrize("num_streams", [1, 3, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 6, 16])
@pytest.mark.parametrize("first", [0, 5])
def test_streams_of_rank_equal_a_search(num_streams, micro_batch_size, dp_size, first):
    share = dp_size * micro_batch_size
    for rank in range(dp_size):
        met = {(first + i) % num_streams for i in range(num_streams * share) if i // micro_batch_size % dp_size == rank}
        assert streams_of_rank(num_streams, first, micro_batch_size, rank, dp_size) == sorted(met)
    for consumed in range(30):
        for stream in range(num_streams):
            expected = sum(i % num_streams == stream for i in range(consumed))
            assert rows_consumed(consumed, stream, num_streams) == expected


def test_streams_share_the_shards_out():
    num_shards, num_streams = 11, 4
    epochs = [
        [shard_order(num_shards, v, num_streams, 9, epoch).tolist() for v in range(num_streams)] for epoch in (0, 1)
    ]
    assert sorted(shard for own in epochs[0] for shard in own) == list(range(num_shards))
    assert [sorted(shards) for shards in epochs[0]] == [sorted(shards) for shards in epochs[1]]
    assert epochs[0] != epochs[1]


def test_default_num_streams():
    assert [default_num_streams(n) for n in (1, 2, 3, 8, 63, 64, 5000)] == [1, 2, 2, 8, 32, 64, 64]
