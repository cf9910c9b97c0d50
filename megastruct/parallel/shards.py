"""Which part of a global parameter a tensor-parallel rank holds.

A global parameter has the name and the meaning that it has in the unsharded layer. `ShardSpec` cuts it into shards and
joins shards again, so that weights, gradients and optimizer state have the same form in checkpoints for every tp.
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
    """Dimension `dim` cut into `ranks` contiguous chunks, as by `torch.chunk`: the last may be short or missing."""

    dim: int
    ranks: int

    def chunk(self, size: int, index: int) -> tuple[int, int]:
        """(start, length) of chunk `index` of a dimension of `size`."""
        length = -(-size // self.ranks)
        start = min(index * length, size)
        return start, min(length, size - start)


@dataclass(frozen=True)
class Box:
    """A cuboid that a rank holds: its start in the global tensor, its start in the local tensor, and its sizes."""

    global_offsets: tuple[int, ...]
    local_offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """One or more cuts along different dimensions; ranks are numbered with the index of the last cut fastest."""

    cuts: tuple[Cut, ...]

    @classmethod
    def along(cls, dim: int, ranks: int) -> ShardSpec:
        """One cut of dimension `dim` over `ranks` ranks."""
        return cls((Cut(dim, ranks),))

    @property
    def num_ranks(self) -> int:
        """The number of shards."""
        return math.prod(cut.ranks for cut in self.cuts)

    def boxes(self, global_shape: Sequence[int], rank: int) -> list[Box]:
        """The cuboids of the global tensor that `rank` holds; here there is exactly one."""
        offsets, sizes = [0] * len(global_shape), list(global_shape)
        for cut, index in zip(self.cuts, self._indices(rank), strict=True):
            offsets[cut.dim], sizes[cut.dim] = cut.chunk(global_shape[cut.dim], index)
        return [Box(tuple(offsets), (0,) * len(offsets), tuple(sizes))]

    def local_shape(self, global_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of the shard of `rank`."""
        return self.boxes(global_shape, rank)[0].sizes

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """The shard of `rank`, as a copy."""
        [box] = self.boxes(full.shape, rank)
        return _within(full, box).clone()

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The global tensor from the shards of all ranks, in the order of ranks.

        Raises ValueError if the number of shards or the shape of one does not fit the cuts.
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
