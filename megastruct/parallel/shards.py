"""Which part of a global parameter a tensor-parallel rank holds.

A global parameter has the name and the meaning that it has in the unsharded layer. `ShardSpec` takes it apart and puts
it together again, so that weights, gradients and optimizer state have one form in checkpoints for every tp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Dimension `dim` in `ranks` contiguous chunks, as `torch.chunk` cuts: equal, the last ones shorter or missing."""

    dim: int
    ranks: int

    def chunk(self, size: int, index: int) -> tuple[int, int]:
        """(start, length) of chunk `index` of a dimension of `size`."""
        length = -(-size // self.ranks)
        start = min(index * length, size)
        return start, min(length, size - start)


@dataclass(frozen=True)
class Box:
    """A cuboid that a rank holds: where it starts in the global tensor, where in the local one, and its sizes."""

    global_offsets: tuple[int, ...]
    local_offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """One or more cuts, each along another dimension; the ranks count through them with the last cut fastest."""

    cuts: tuple[Cut, ...]

    @classmethod
    def along(cls, dim: int, ranks: int) -> ShardSpec:
        return cls((Cut(dim, ranks),))

    @property
    def num_ranks(self) -> int:
        return math.prod(cut.ranks for cut in self.cuts)

    def boxes(self, global_shape: Sequence[int], rank: int) -> list[Box]:
        """What `rank` holds of the global tensor, as cuboids: one."""
        offsets, sizes = [0] * len(global_shape), list(global_shape)
        for cut, index in zip(self.cuts, self._indices(rank), strict=True):
            offsets[cut.dim], sizes[cut.dim] = cut.chunk(global_shape[cut.dim], index)
        return [Box(tuple(offsets), (0,) * len(offsets), tuple(sizes))]

    def local_shape(self, global_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        return self.boxes(global_shape, rank)[0].sizes

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """The part of `rank`, as a copy."""
        [box] = self.boxes(full.shape, rank)
        return _within(full, box).clone()

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The global tensor from the parts of all ranks, in their order.

        Raises ValueError if their number or a shape does not fit the cuts.
        """
        if len(shards) != self.num_ranks:
            raise ValueError(f"{len(shards)} shards for {self.num_ranks} ranks")
        shape = list(shards[0].shape)
        for cut in self.cuts:
            along = [shards[self._rank_with(cut, index)].shape[cut.dim] for index in range(cut.ranks)]
            shape[cut.dim] = sum(along)
        full = shards[0].new_empty(shape)
        for rank, local in enumerate(shards):
            [box] = self.boxes(shape, rank)
            if tuple(local.shape) != box.sizes:
                raise ValueError(f"shard {rank} is {list(local.shape)}, not {list(box.sizes)}")
            _within(full, box).copy_(local)
        return full

    def _indices(self, rank: int) -> list[int]:
        assert 0 <= rank < self.num_ranks
        indices = []
        for cut in reversed(self.cuts):
            rank, index = divmod(rank, cut.ranks)
            indices.append(index)
        return indices[::-1]

    def _rank_with(self, cut: Cut, index: int) -> int:
        """The rank that has chunk `index` of `cut` and chunk 0 of all others."""
        rank = 0
        for other in self.cuts:
            rank = rank * other.ranks + (index if other == cut else 0)
        return rank


def _within(full: Tensor, box: Box) -> Tensor:
    for dim, (offset, size) in enumerate(zip(box.global_offsets, box.sizes, strict=True)):
        full = full.narrow(dim, offset, size)
    return full
