"""Who works on which matrix, for optimizers that cannot step the parts into which ZeRO and tensor parallelism cut it.

Every matrix of a pipeline stage has one owner among the stage's ranks, so that nothing is computed twice. In each step
the ranks send their fragments of a matrix to its owner; the owner computes the update of the whole matrix and sends
every rank the fragments that it needs. Here is the plan: owners, rounds, and what is sent. It is arithmetic without
torch, which the planner and the engine share.

The ranks of a stage are numbered replica * tp_size + tensor-parallel rank, as in the topology.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ROUND_VALUES = 1 << 26  # that a rank sends, receives or works on at once: 256 MiB in fp32


class WholeMatrices(Protocol):
    """What a `whole` group's step sees of the other ranks. Collective over the stage."""

    def __call__(
        self, values: Mapping[Tensor, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Apply `function` to whole matrices, each on one rank.

        `values`: of every stepped tensor a tensor of its size, such as the momentum. `function` maps matrices of one
        shape, [b, ..., m, n], to as many. Yields (stepped tensor, start, result [n]) for each of this rank's fragments.
        """


@dataclass(frozen=True)
class Matrix:
    """A parameter [..., m, n] of a stage, as a whole.

    `flops`: of a step on it. `held`: by rank, (start, number) of the values that the rank owns of its flattened part.
    `is_cut`: tensor-parallel ranks have different parts; otherwise each has the whole parameter.
    """

    shape: tuple[int, ...]
    flops: int
    held: tuple[tuple[int, int], ...]
    is_cut: bool

    @property
    def num_values(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Ownership:
    """The plan for the matrices of one stage: `owners` and `sources` (the ranks whose fragments make a matrix whole,
    in ascending order), by matrix."""

    matrices: tuple[Matrix, ...]
    tp_size: int
    owners: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], tp_size: int) -> Ownership:
        """Choose the owners: of the ranks that hold most of a matrix, so that little travels, the one with least work.

        If that gave a rank more than 1.1 times the mean work, or the work of the largest matrix where that is more, it
        is the rank with least work of all.
        """
        num_ranks = len(matrices[0].held) if matrices else 0
        work = [0] * num_ranks
        total = sum(matrix.flops for matrix in matrices)
        limit = max([1.1 * total / max(num_ranks, 1), *(matrix.flops for matrix in matrices)])
        owners, sources = [0] * len(matrices), [()] * len(matrices)  # type: list[int], list[tuple[int, ...]]
        for index in sorted(range(len(matrices)), key=lambda index: -matrices[index].flops):
            matrix = matrices[index]
            most = max(number for _, number in matrix.held)
            near = [
                rank
                for rank, (_, number) in enumerate(matrix.held)
                if number == most and work[rank] + matrix.flops <= limit
            ]
            owner = min(near or range(num_ranks), key=lambda rank: work[rank])
            work[owner] += matrix.flops
            owners[index], sources[index] = owner, _sources(matrix, owner, tp_size)
        return cls(tuple(matrices), tp_size, tuple(owners), tuple(sources))

    @cached_property
    def num_ranks(self) -> int:
        """The number of ranks of the stage."""
        return len(self.matrices[0].held) if self.matrices else 0

    def flops(self) -> list[int]:
        """The work of a step, by rank."""
        return self._by_rank(lambda matrix, owner, _: {owner: matrix.flops})

    def sent_values(self) -> list[int]:
        """Values that a step sends to other ranks, by rank: fragments to owners and back."""

        def sent(matrix: Matrix, owner: int, sources: tuple[int, ...]) -> dict[int, int]:
            own = {rank: matrix.held[rank][1] for rank in sources if rank != owner}
            return {**own, owner: sum(number for rank, (_, number) in enumerate(matrix.held) if rank != owner)}

        return self._by_rank(sent)

    def rounds(self, indices: Sequence[int], limit: int = ROUND_VALUES) -> list[list[int]]:
        """The matrices `indices` in rounds, in each of which no rank handles more than `limit` values at once.

        A matrix that is larger raises the limit. Owners take turns, so that they work at the same time, and each takes
        matrices of one shape after the other, which it can work on together.
        """
        by_owner: dict[int, list[int]] = {}
        for index in sorted(indices, key=lambda index: (self.matrices[index].shape, index)):
            by_owner.setdefault(self.owners[index], []).append(index)
        turns = [index for turn in range(len(indices)) for own in by_owner.values() for index in own[turn : turn + 1]]
        limit = max([limit, *(max(self._handled(index).values()) for index in indices)])
        rounds: list[list[int]] = []
        handled: dict[tuple[str, int], int] = {}
        for index in turns:
            more = self._handled(index)
            if not rounds or any(handled.get(key, 0) + number > limit for key, number in more.items()):
                rounds.append([])
                handled = {}
            rounds[-1].append(index)
            handled = {**handled, **{key: handled.get(key, 0) + number for key, number in more.items()}}
        return rounds

    def handled_values(self, indices: Sequence[int]) -> dict[str, int]:
        """The most values that a rank has in each buffer in a round of these matrices.

        kept: its fragments. owned: its matrices. returned: all fragments of them, of all ranks.
        """
        total: dict[tuple[str, int], int] = {}
        for index in indices:
            for key, number in self._handled(index).items():
                total[key] = total.get(key, 0) + number
        buffers = ("kept", "owned", "returned")
        return {each: max(number for (buffer, _), number in total.items() if buffer == each) for each in buffers}

    def _handled(self, index: int) -> dict[tuple[str, int], int]:
        """Values of a matrix in the buffers of the ranks, by (buffer, rank)."""
        matrix, owner = self.matrices[index], self.owners[index]
        kept = {("kept", rank): number for rank, (_, number) in enumerate(matrix.held)}
        return {**kept, ("owned", owner): matrix.num_values, ("returned", owner): sum(kept.values())}

    def _by_rank(self, values: Callable[[Matrix, int, tuple[int, ...]], Mapping[int, int]]) -> list[int]:
        total = [0] * self.num_ranks
        for each in zip(self.matrices, self.owners, self.sources, strict=True):
            for rank, value in values(*each).items():
                total[rank] += value
        return total


def _sources(matrix: Matrix, owner: int, tp_size: int) -> tuple[int, ...]:
    """The ranks that send: one replica, or all if replicas share the values; one tensor-parallel rank, or all."""
    replica, tensor_rank = divmod(owner, tp_size)
    part = max(start + number for start, number in matrix.held)
    replicas = [replica] if matrix.held[owner] == (0, part) else range(len(matrix.held) // tp_size)
    tensor_ranks = range(tp_size) if matrix.is_cut else [tensor_rank]
    ranks = (replica * tp_size + tensor_rank for replica in replicas for tensor_rank in tensor_ranks)
    return tuple(rank for rank in ranks if matrix.held[rank][1])
