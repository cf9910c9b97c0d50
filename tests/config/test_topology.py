"""The grid of ranks, and world sizes that do not divide."""

from __future__ import annotations

import pytest

from megastruct.errors import UserError
from megastruct.parallel.topology import Topology


def test_every_coordinate_once_with_the_replica_fastest() -> None:
    topology = Topology(pp_size=3, dp_size=4)
    coordinates = [(topology.pp_rank(rank), topology.dp_rank(rank)) for rank in range(topology.world_size)]
    assert coordinates == [(stage, replica) for stage in range(3) for replica in range(4)]


def test_grid_of_a_world() -> None:
    assert Topology.of_world(8, pp_size=2, dp_size=None) == Topology(2, 4)
    with pytest.raises(UserError, match=r"parallel.pp: 6 processes do not divide into pipelines of 4 stages"):
        Topology.of_world(6, pp_size=4, dp_size=None)
    with pytest.raises(UserError, match=r"parallel.dp: pp 2 x dp 2 needs 4 processes, 6 were started"):
        Topology.of_world(6, pp_size=2, dp_size=2)


def test_same_grid_as_deepspeed() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs, ours = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=3), Topology(2, 3)
    for rank in range(6):
        coordinate = theirs.get_coord(rank)
        assert (coordinate.pipe, coordinate.data) == (ours.pp_rank(rank), ours.dp_rank(rank))
