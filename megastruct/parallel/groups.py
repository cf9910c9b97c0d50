"""A tensor-parallel group as layers see it: its process group, its size, and the rank of this process in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megastruct.parallel.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorGroup:
    """The `size` ranks that share every block's weights; `group` is None for a single process (size 1).

    `sums_once`: the engine sums the gradients of replicated parameters over the group once a step (with
    `collectives.sum_gradients`); otherwise every backward sums them.
    """

    group: ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    sums_once: bool = False


ALONE = TensorGroup()  # one process


def make_tensor_group(topology: Topology, sums_once: bool = False) -> TensorGroup:
    """This rank's tensor-parallel group. Collective over the world: every rank makes every group, in one order."""
    import torch.distributed as dist  # here, so that config checks and tools need not load it

    rank = dist.get_rank()
    if topology.tp_size == 1:
        return ALONE
    groups = [(ranks, dist.new_group(ranks)) for ranks in topology.tp_groups()]
    ranks, group = next((ranks, group) for ranks, group in groups if rank in ranks)
    return TensorGroup(group, len(ranks), ranks.index(rank), sums_once)


@dataclass(frozen=True)
class StageGroup:
    """The `size` ranks of a pipeline stage, replica * `tp_size` + tensor-parallel rank; `group` is None for one."""

    group: ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    tp_size: int = 1


def make_stage_group(topology: Topology) -> StageGroup:
    """The ranks of this rank's stage. Collective over the world: every rank makes every group, in one order."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), topology.dp_size * topology.tp_size
    if size == 1:
        return StageGroup()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, topology.world_size, size)]
    return StageGroup(groups[topology.pp_rank(rank)], size, rank % size, topology.tp_size)
