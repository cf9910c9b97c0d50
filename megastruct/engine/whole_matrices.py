"""Whole matrices for optimizers that need them, on every layout: fragments travel to owners, and updates back.

`optimizers/ownership.py` has the plan. DeepSpeed's wrappers all hand our optimizer tensors whose gradient is final, and
use what it makes of them: whole parameters (ZeRO 0), or flat partitions with fragments of many parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megastruct.config.schema import Config
from megastruct.engine import zero
from megastruct.optimizers import MASTER, OPTIMIZERS, Role
from megastruct.optimizers.ownership import Matrix, Ownership
from megastruct.parallel.collectives import exchange
from megastruct.parallel.groups import StageGroup, make_stage_group
from megastruct.parallel.shards import ShardSpec
from megastruct.parallel.topology import Topology


class Place(NamedTuple):
    """Where a rank has its fragment of a parameter: values [start, start + number) of its flattened part, from `offset`
    on in the stepped tensor of this index, `tensor`; -1 where it has nothing, number 0."""

    start: int
    number: int
    tensor: int
    offset: int


class Exchange:
    """A `WholeMatrices`, for the matrices of this rank's stage."""

    def __init__(
        self,
        ownership: Ownership,
        specs: Sequence[ShardSpec | None],
        stepped: Sequence[Tensor],
        places: Sequence[Place],
        group: StageGroup,
    ) -> None:
        """`specs`, `places`: by matrix of the plan, how it is cut over tensor-parallel ranks and this rank's fragment.
        A place names its tensor of `stepped` also where this rank has nothing."""
        self.ownership, self.specs, self.group = ownership, specs, group
        self.stepped, self.places = list(stepped), list(places)
        self.rounds: dict[tuple[int, ...], list[list[int]]] = {}

    def __call__(
        self, values: Mapping[Tensor, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, int, Tensor]]:
        """See `WholeMatrices`. All ranks pass the same stepped tensors; ZeRO 3 steps some at a time."""
        given = tuple(index for index, tensor in enumerate(self.stepped) if tensor in values)
        if given not in self.rounds:
            matrices = [matrix for matrix, place in enumerate(self.places) if place.tensor in given]
            self.rounds[given] = self.ownership.rounds(matrices)
        for matrices in self.rounds[given]:
            fragments = [
                values[self.stepped[place.tensor]].view(-1)[place.offset : place.offset + place.number]
                for place in (self.places[matrix] for matrix in matrices)
            ]
            results = self._one_round(matrices, fragments, function)
            for matrix, result in zip(matrices, results, strict=True):
                yield self.stepped[self.places[matrix].tensor], self.places[matrix].offset, result

    def _one_round(
        self, matrices: Sequence[int], fragments: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """The fragments of the results, as `fragments` are of the matrices."""
        own = [matrix for matrix in matrices if self.ownership.owners[matrix] == self.group.rank]
        updates = _together(self._collect(matrices, own, fragments), function)
        return self._give_back(matrices, own, updates, fragments[0])

    def _collect(self, matrices: Sequence[int], own: Sequence[int], fragments: Sequence[Tensor]) -> list[Tensor]:
        """Send fragments to the owners; the whole matrices that this rank owns."""
        plan, ranks = self.ownership, range(self.group.size)
        if self.group.size == 1:
            return [fragment.view(plan.matrices[m].shape) for m, fragment in zip(matrices, fragments, strict=True)]
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        for matrix, fragment in zip(matrices, fragments, strict=True):
            if self.group.rank in plan.sources[matrix]:
                outgoing[plan.owners[matrix]].append(fragment)
        sizes = {r: [plan.matrices[m].held[r][1] for m in own if r in plan.sources[m]] for r in ranks}
        received = exchange(outgoing, [sum(sizes[rank]) for rank in ranks], fragments[0], self.group)
        pieces = iter(received.split([size for rank in ranks for size in sizes[rank]]))
        by_matrix: dict[int, dict[int, Tensor]] = {matrix: {} for matrix in own}
        for rank in ranks:
            for matrix in own:
                if rank in plan.sources[matrix]:
                    by_matrix[matrix][rank] = next(pieces)
        return [self._join(matrix, by_matrix[matrix]) for matrix in own]

    def _join(self, matrix: int, pieces: Mapping[int, Tensor]) -> Tensor:
        """The whole matrix from the pieces of its sources, by rank."""
        plan, spec, tp_size = self.ownership.matrices[matrix], self.specs[matrix], self.group.tp_size
        parts: dict[int, list[tuple[int, Tensor]]] = {}
        for rank, piece in pieces.items():
            parts.setdefault(rank % tp_size, []).append((plan.held[rank][0], piece))
        joined = {
            tensor_rank: own[0][1] if len(own) == 1 else torch.cat([p for _, p in sorted(own, key=lambda x: x[0])])
            for tensor_rank, own in parts.items()
        }
        if spec is None:
            [whole] = joined.values()
            return whole.view(plan.shape)
        return spec.unshard([joined[t].view(spec.local_shape(plan.shape, t)) for t in range(tp_size)])

    def _give_back(
        self, matrices: Sequence[int], own: Sequence[int], updates: Sequence[Tensor], like: Tensor
    ) -> list[Tensor]:
        """Send every rank its fragments of the updates; this rank's, by matrix."""
        if self.group.size == 1:
            return [update.reshape(-1) for update in updates]
        plan, rank, ranks = self.ownership, self.group.rank, range(self.group.size)
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        for matrix, update in zip(own, updates, strict=True):
            spec, held = self.specs[matrix], plan.matrices[matrix].held
            parts = [update if spec is None else spec.shard(update, t) for t in range(self.group.tp_size)]
            for to, (start, number) in enumerate(held):
                outgoing[to].append(parts[to % self.group.tp_size].reshape(-1)[start : start + number])
        sizes = {r: [plan.matrices[m].held[rank][1] for m in matrices if plan.owners[m] == r] for r in ranks}
        received = exchange(outgoing, [sum(sizes[r]) for r in ranks], like, self.group)
        pieces = {
            r: iter(part.split(sizes[r])) for r, part in enumerate(received.split([sum(sizes[r]) for r in ranks]))
        }
        return [next(pieces[plan.owners[matrix]]) for matrix in matrices]


def stage_group(config: Config, topology: Topology) -> StageGroup:
    """The ranks that share whole matrices; this one alone if the optimizer needs none. Collective over the world."""
    needed = any(group.whole for group in OPTIMIZERS[config.optimizer.kind].groups)
    return make_stage_group(topology) if needed else StageGroup()


def share_whole_matrices(
    wrapper: Any, roles: Mapping[nn.Parameter, Role], config: Config, topology: Topology, group: StageGroup
) -> None:
    """Give our optimizer, below DeepSpeed's `wrapper`, an `Exchange` if it needs whole matrices. Collective over the
    stage, on all of whose ranks the parameters have the same order."""
    record, zero_stage = OPTIMIZERS[config.optimizer.kind], config.parallel.zero_stage
    parameters = [parameter for parameter, role in roles.items() if record.group_of(role).whole]
    if not parameters:
        return
    stepped = [tensor for _, tensor in zero.stepped_tensors(wrapper)]
    dp_rank = topology.dp_rank(dist.get_rank())
    own = [_place(zero.own_fragment(wrapper, p, zero_stage, dp_rank, ()), stepped) for p in parameters]
    every = [own]
    if group.size > 1:
        every = [own] * group.size
        dist.all_gather_object(every, own, group=group.group)
    matrices, specs, places = [], [], []
    for parameter, of_ranks in zip(parameters, zip(*every, strict=True), strict=True):
        specs.append(getattr(parameter, "shard_spec", None))
        shape = tuple(getattr(parameter, "global_shape", None) or zero.whole_shape(parameter))
        flops = record.step_flops(shape, config.optimizer.settings)
        held = tuple((place.start, place.number) for place in of_ranks)
        matrices.append(Matrix(shape, flops, held, is_cut=specs[-1] is not None))
        start, number, _, offset = of_ranks[group.rank]
        places.append(Place(start, number, max(place.tensor for place in of_ranks), offset))
    inner: Any = zero.inner_optimizer(wrapper)
    inner.exchange = Exchange(Ownership.of(matrices, group.tp_size), specs, stepped, places, group)


def _place(fragment: tuple[int, Mapping[str, Tensor]], stepped: Sequence[Tensor]) -> Place:
    """Where a fragment's master, a view of a stepped tensor, lies in it."""
    start, tensors = fragment
    if not tensors or not tensors[MASTER].numel():
        return Place(0, 0, -1, 0)
    master = tensors[MASTER]
    for index, tensor in enumerate(stepped):
        offset = (master.data_ptr() - tensor.data_ptr()) // tensor.element_size()
        if 0 <= offset <= tensor.numel() - master.numel():
            return Place(start, master.numel(), index, offset)
    raise AssertionError("a parameter's master is in none of the tensors that the optimizer steps")


def _together(matrices: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The results of a function of [b, ..., m, n], for all matrices of one shape at once."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in by_shape.values():
        batch = function(torch.stack([matrices[index] for index in indices]))
        results |= dict(zip(indices, batch.unbind(), strict=True))
    return [results[index] for index in range(len(matrices))]
