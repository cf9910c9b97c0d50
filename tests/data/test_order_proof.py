"""Every sample once an epoch, whoever reads it: by enumeration at 10^5 samples, by arithmetic at 10^9.

By arithmetic: `deal` gives each global sample to exactly one rank and place, since sample -> (micro-batch, place in it)
-> (rank, micro-batch of the rank) is a change of base; `epoch_permutation` is a bijection of the rows, since each round
adds to one half what depends on the other half alone, and so can be undone, and walking the cycles of a bijection until
they are back inside of a subset is a bijection of the subset. The tests hold both at sizes that cannot be listed.
"""

import hashlib
import itertools

import numpy as np
import pytest

from marks import soak
from megastruct.data import open_tokenizer
from megastruct.data.mixture import Mixture
from megastruct.data.order import deal, epoch_permutation, locate_rows
from megastruct.data.tokens.data import TokenData, TokenSource
from megastruct.data.tokens.manifest import (
    Manifest,
    Settings,
    SourceRecord,
    Splits,
    TokenFile,
    TokenizerRecord,
    Totals,
    total_of,
)
from megastruct.parallel.topology import Topology
from slow_order import decipher, inverse

NUM_ROWS = 100_000
SEQ_LENGTH = 2
GLOBAL_BATCH_SIZE = 480
LAYOUTS = [(1, 480), (2, 8), (3, 20), (8, 5), (16, 30), (5, 1)]  # dp_size, micro_batch_size


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, tokenizer_path):
    """Token shards of which the k-th row begins with the id k."""
    folder = tmp_path_factory.mktemp("numbered")
    tokenizer = open_tokenizer(tokenizer_path)
    ids = (np.arange(NUM_ROWS * SEQ_LENGTH + 1) // SEQ_LENGTH).astype("<u4")
    files = []
    for index, part in enumerate(np.split(ids, [70_001, 70_002, 150_000])):
        part.tofile(folder / f"{index}.bin")
        sha256 = hashlib.sha256(part.tobytes()).hexdigest()
        name = f"{index}.bin"
        files.append(TokenFile(file=name, num_tokens=len(part), num_documents=0, num_bytes=part.nbytes, sha256=sha256))
    record = TokenizerRecord(file="t", fingerprint="", vocab_size=NUM_ROWS + 1, eod_id=0)
    sources = (SourceRecord(name="x", num_bytes=0),)
    manifest = Manifest(
        format="megastruct-tokens",
        version=1,
        dtype="uint32",
        settings=Settings(
            tokenizer=record, text_column="x", validation_fraction=0.0, max_shard_tokens=1, sources=sources
        ),
        splits=Splits(train=tuple(files), validation=()),
        totals=Totals(train=total_of(files), validation=total_of(())),
        skipped_documents={},
    )
    source = TokenSource.open(folder, manifest, SEQ_LENGTH, NUM_ROWS + 1)
    return TokenData([source], Mixture([1]), tokenizer, seed=7)


def rows_of_steps(data, dp_size, micro_batch_size, first_step, num_steps, readers=None) -> np.ndarray:
    """Row numbers in the global order, read by all ranks: [num_steps * GLOBAL_BATCH_SIZE]."""
    sizes = (GLOBAL_BATCH_SIZE, micro_batch_size)
    start = first_step * GLOBAL_BATCH_SIZE
    readers = readers or [data.train_reader(*sizes, rank, dp_size, None, start) for rank in range(dp_size)]
    count = GLOBAL_BATCH_SIZE // dp_size // micro_batch_size
    rows = np.empty((num_steps, count, dp_size, micro_batch_size), dtype=np.int64)
    for rank, reader in enumerate(readers):
        for step, micro_batch in itertools.product(range(num_steps), range(count)):
            rows[step, micro_batch, rank] = next(reader).ids[:, 0].numpy()
    return rows.reshape(-1)


@pytest.mark.parametrize("dp_size, micro_batch_size", [soak(*LAYOUTS[1]), LAYOUTS[2], soak(*LAYOUTS[3])])
def test_every_row_once_an_epoch_for_any_number_of_ranks(numbered, dp_size, micro_batch_size):
    """Two epochs; they end inside of a step."""
    num_steps = 2 * NUM_ROWS // GLOBAL_BATCH_SIZE + 1
    rows = rows_of_steps(numbered, dp_size, micro_batch_size, 0, num_steps)
    for epoch in range(2):
        assert (np.sort(rows[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]) == np.arange(NUM_ROWS)).all()
    assert (rows == locate_rows(np.arange(len(rows)), NUM_ROWS, seed=7)).all()


def test_every_row_once_though_the_layout_changes_again_and_again(numbered):
    """A run that is resumed on another layout every few steps: the order of an epoch goes on over every border."""
    num_steps = NUM_ROWS // GLOBAL_BATCH_SIZE + 1
    layouts, parts, step = itertools.cycle(LAYOUTS), [], 0
    for length in itertools.cycle((1, 7, 30, 13)):
        length = min(length, num_steps - step)
        parts.append(rows_of_steps(numbered, *next(layouts), step, length))
        step += length
        if step == num_steps:
            break
    rows = np.concatenate(parts)
    assert (np.sort(rows[:NUM_ROWS]) == np.arange(NUM_ROWS)).all()
    assert (rows == locate_rows(np.arange(len(rows)), NUM_ROWS, seed=7)).all()


@pytest.mark.parametrize(
    "before, after", [((4, 2, 1), (4, 1, 1)), ((8, 1, 2), (2, 2, 1)), ((6, 3, 2), (4, 4, 1)), ((1, 1, 1), (8, 4, 2))]
)
def test_order_goes_on_over_a_change_of_pipeline_depth_and_tensor_parallelism(numbered, before, after):
    """(processes, pp, tp): all ranks of a replica that read data read the same samples."""
    parts = []
    for (world_size, pp_size, tp_size), (first, count), micro_batch_size in ((before, (0, 5), 2), (after, (5, 6), 6)):
        topology = Topology.of_world(world_size, pp_size, None, tp_size)
        seen = []
        for stage, tp_rank in itertools.product({0, pp_size - 1}, range(tp_size)):
            ranks = [
                rank
                for rank in range(world_size)
                if topology.pp_rank(rank) == stage and topology.tp_rank(rank) == tp_rank
            ]
            assert [topology.dp_rank(rank) for rank in ranks] == list(range(topology.dp_size))
            seen.append(rows_of_steps(numbered, topology.dp_size, micro_batch_size, first, count))
        assert all((rows == seen[0]).all() for rows in seen)
        parts.append(seen[0])
    assert (np.concatenate(parts) == locate_rows(np.arange(11 * GLOBAL_BATCH_SIZE), NUM_ROWS, seed=7)).all()


# Sizes that cannot be listed --------------------------------------------------------------------------------------

BILLION = 10**9


@pytest.mark.parametrize("size", [BILLION, BILLION + 7, 968_000_000 * 3])
def test_the_permutation_of_a_billion_rows_is_a_bijection(size):
    permutation = epoch_permutation(seed=3, epoch=2, num_rows=size)
    left, right = int(permutation._left_size), int(permutation._right_size)
    # The network permutes left x right >= size; fewer than `left` values lie outside, so that walks are short.
    assert size <= left * right < size + left and abs(left - right) <= 1
    rng = np.random.default_rng(0)
    indices = np.concatenate([np.arange(1000), size - 1 - np.arange(1000), rng.integers(0, size, 200_000)])
    images = permutation(indices)
    assert images.min() >= 0 and images.max() < size
    assert (inverse(permutation, images) == indices).all()
    assert (permutation(inverse(permutation, indices)) == indices).all()
    # spread evenly: 100 bins of about 2,000
    counts = np.histogram(images, bins=100, range=(0, size))[0]
    assert abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5


def test_each_round_of_the_network_can_be_undone():
    """On the whole domain of a small network, round by round: the step of which the proof is made."""
    permutation = epoch_permutation(seed=3, epoch=2, num_rows=997)
    domain = np.arange(int(permutation._left_size * permutation._right_size), dtype=np.uint64)
    keys = permutation._keys
    for num_rounds in range(len(keys) + 1):
        permutation._keys = keys[:num_rounds]
        images = permutation._encipher(domain)
        assert (np.sort(images) == domain).all() and (decipher(permutation, images) == domain).all()


@pytest.mark.parametrize("dp_size, micro_batch_size", [(1, 1), (3, 8), (64, 4), (1000, 3)])
def test_deal_is_a_change_of_base_at_a_billion(dp_size, micro_batch_size):
    """Each sample is dealt to the one rank and place that its digits name, in every step, near 10^9 and beyond."""
    global_batch_size = 2 * dp_size * micro_batch_size
    for first in (0, BILLION - BILLION % global_batch_size, 10**15 - 10**15 % global_batch_size):
        dealt = [deal(first, global_batch_size, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
        assert (np.sort(np.concatenate([part.ravel() for part in dealt])) == first + np.arange(global_batch_size)).all()
        for rank in (0, dp_size - 1):
            offsets = dealt[rank] - first
            assert (offsets // micro_batch_size % dp_size == rank).all()
            assert (offsets % micro_batch_size == np.arange(micro_batch_size)).all()


def test_epochs_of_a_mixture_at_a_billion():
    """Each source's own samples are 0, 1, 2, ... without a gap: with its permutation each row comes once an epoch."""
    mixture = Mixture((0.9, 0.07, 0.03))
    first = BILLION - 3
    sources, indices = mixture.locate(np.arange(first, first + 10_000))
    for source in range(3):
        own = indices[sources == source]
        begin = int(mixture.consumed(first)[source])
        assert (own == begin + np.arange(len(own))).all() and len(own)
        assert begin == pytest.approx(first * (0.9, 0.07, 0.03)[source], abs=2)
