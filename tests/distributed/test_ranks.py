"""Ranks that a server forks, as on GPUs, here over gloo: the same results in processes of their own."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ranks
from configs import tiny_config
from megastruct.parallel.topology import Topology
from ranks import run_ranks
from runs import losses

STATE: list[int] = []


def state(fails: bool) -> tuple[int, list[int], str | None, bool]:
    """The process that a rank was forked from, nothing of other cases, the environment, and who imported everything."""
    STATE.append(dist.get_rank())
    if fails and dist.get_rank() == 1:
        raise ValueError("rank 1 fails")
    return os.getppid(), STATE, os.environ.get("OF_THIS_CASE"), os.getppid() == ranks.IMPORTED_IN


@pytest.mark.soak
def test_a_server_forks_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(parallel={"pp": 2}, training={"num_steps": 4})
    forked = run_ranks(2, losses, config, Topology(2, 1))
    server: Any = ranks.server()
    monkeypatch.setattr(ranks, "_context", lambda: server)
    monkeypatch.setenv("OF_THIS_CASE", "1")
    [first, second] = run_ranks(2, state, False)
    assert first == (second[0], [0], "1", True) and second[1:] == ([1], "1", True)
    assert first[0] != os.getpid()
    with pytest.raises(AssertionError, match="rank 1 fails"):
        run_ranks(2, state, True)
    monkeypatch.delenv("OF_THIS_CASE")
    assert run_ranks(2, state, False)[0] == (first[0], [0], None, True)  # the same server
    assert run_ranks(2, losses, config, Topology(2, 1)) == forked
    assert not torch.cuda.is_initialized()
