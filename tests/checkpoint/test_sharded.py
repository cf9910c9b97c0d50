"""Fragments of parts of tensors: every element is in one piece, at its place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megastruct.checkpoint.sharded import ShardedTensor, flat_cuboids
from megastruct.parallel.shards import Box, Cut, ShardSpec

SHAPES = [(), (7,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_range_is_a_few_cuboids_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        cuboids = list(flat_cuboids(shape, start, stop))
        assert len(cuboids) <= max(1, 2 * len(shape) - 1)
        found = []
        for offsets, sizes in cuboids:
            piece = numbers
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                piece = piece.narrow(dim, offset, size)
            found += piece.flatten().tolist()
        assert found == list(range(start, stop))


def test_long_ranges_are_cut() -> None:
    cuboids = list(flat_cuboids((100, 10), 5, 1000, max_elements=200))
    assert [sizes for _, sizes in cuboids] == [(1, 5), *[(20, 10)] * 4, (19, 10)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (ShardSpec(()), (5, 7)),
        (ShardSpec.along(0, 2), (6, 5)),
        (ShardSpec.along(1, 4), (3, 8)),
        (ShardSpec.along(0, 4), (61, 3)),  # the last rank has fewer rows
        (ShardSpec((Cut(0, 2), Cut(1, 2))), (4, 6)),
        (ShardSpec((Cut(1, 2), Cut(2, 2))), (2, 4, 6)),
    ],
    ids=str,
)
def test_fragments_of_all_ranks_make_the_tensor(spec: ShardSpec, shape: tuple[int, ...], replicas: int) -> None:
    wanted = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    whole = torch.full(shape, -1.0)
    for rank in range(spec.num_ranks):
        local = spec.shard(wanted, rank)
        boxes = spec.boxes(shape, rank)
        length = -(-local.numel() // replicas)
        for start in range(0, local.numel(), length):
            fragment = local.flatten()[start : start + length]
            sharded = ShardedTensor.of_fragment(fragment, start, local.shape, shape, boxes)
            for offsets, piece in sharded.pieces.items():
                place = whole
                for dim, offset in enumerate(offsets):
                    place = place.narrow(dim, offset, piece.shape[dim])
                assert bool((place == -1).all()), "two ranks have the same element"
                place.copy_(piece)
    assert torch.equal(whole, wanted)


def test_padding_is_in_no_piece() -> None:
    """Rows 3 and 4 of a local tensor are padding; what is left is at row 2 of the global one."""
    boxes = [Box((2, 0), (0, 0), (3, 4))]
    sharded = ShardedTensor.of_fragment(torch.arange(18.0), 2, (5, 4), (5, 4), boxes)
    assert {offsets: piece.tolist() for offsets, piece in sharded.pieces.items()} == {
        torch.Size((2, 2)): [[0.0, 1.0]],
        torch.Size((3, 0)): [[2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0]],
    }
    sharded.pieces[torch.Size((2, 2))].fill_(9)
    assert sharded.__create_chunk_list__()[0].sizes == torch.Size((1, 2))


def test_pieces_are_views() -> None:
    fragment = torch.zeros(6)
    sharded = ShardedTensor.of_fragment(fragment, 1, (2, 4), (2, 4), [Box((0, 0), (0, 0), (2, 4))])
    for number, piece in enumerate(sharded.pieces.values(), start=1):
        piece.fill_(number)
    assert fragment.tolist() == [1, 1, 1, 2, 2, 2]
