"""The grid of ranks, and world sizes that do not divide."""

from __future__ import annotations

import pytest

from megastruct.errors import UserError
from megastruct.parallel.topology import Topology


def test_every_coordinate_once_with_the_replica_fastest() -> None:
    topology = Topology(pp_size=3, dp_size=4, tp_size=2)
    coordinates = [(topology.pp_rank(r), topology.dp_rank(r), topology.tp_rank(r)) for r in range(topology.world_size)]
    assert coordinates == [(stage, replica, part) for stage in range(3) for replica in range(4) for part in range(2)]
    assert topology.tp_groups()[:2] == [[0, 1], [2, 3]]


def test_grid_of_a_world() -> None:
    assert Topology.of_world(8, pp_size=2, dp_size=None) == Topology(2, 4)
    assert Topology.of_world(8, pp_size=2, dp_size=None, tp_size=2) == Topology(2, 2, 2)
    with pytest.raises(UserError, match=r"parallel.pp, parallel.tp: 6 processes do not divide into pp 2 x tp 2"):
        Topology.of_world(6, pp_size=2, dp_size=None, tp_size=2)
    with pytest.raises(UserError, match=r"parallel.pp: 6 processes do not divide into pipelines of 4 stages"):
        Topology.of_world(6, pp_size=4, dp_size=None)
    with pytest.raises(UserError, match=r"parallel.dp: pp 2 x dp 2 needs 4 processes, 6 were started"):
        Topology.of_world(6, pp_size=2, dp_size=2)


def test_same_grid_as_deepspeed() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs, ours = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3), Topology(2, 3, 2)
    for rank in range(12):
        place = theirs.get_coord(rank)
        assert (place.pipe, place.data, place.model) == (ours.pp_rank(rank), ours.dp_rank(rank), ours.tp_rank(rank))
    assert theirs.get_axis_comm_lists("model") == ours.tp_groups()
