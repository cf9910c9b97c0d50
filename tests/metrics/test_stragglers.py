"""The slowest rank, and what counts as waiting for others."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from megastruct.metrics.stragglers import Parts, notable, slowest
from megastruct.metrics.waiting import Waiting
from ranks import run_ranks

DELAY_SECONDS = 0.3


def test_the_rank_with_most_work_of_its_own() -> None:
    """Not the one with the longest step, which all have."""
    ranks = [Parts(1.0, 0.0, 1.5), Parts(0.5, 2.0, 0.0), Parts(1.25, 0.0, 1.25), Parts(1.0, 0.25, 1.25)]
    metrics = slowest(ranks)
    assert metrics == {
        "slowest_rank": 1,
        "slowest_compute_seconds": 0.5,
        "slowest_data_wait_seconds": 2.0,
        "slowest_waiting_seconds": 0.0,
        "median_compute_seconds": 1.0,
        "median_data_wait_seconds": 0.0,
    }
    assert notable(metrics) == "slowest rank 1: data wait 2 s, median 0 s"
    assert notable(slowest([Parts(1.0, 0.0, 1.5), Parts(2.25, 0.1, 0.0)])) == (
        "slowest rank 1: compute 2.25 s, median 1 s"
    )
    assert notable(slowest([Parts(1.0, 0.0, 0.25), Parts(1.25, 0.0, 0.0)])) == ""
    assert slowest(ranks[:1]) == {} and notable({}) == ""


def waited() -> list[float]:
    """Seconds of a rank in three steps with a late rank 1: a call that waits, a call that is waited for at last while
    this rank sleeps as long, and a call in a thread of its own."""
    waiting, tensor, seconds = Waiting(torch.device("cpu"), 2), torch.ones(1), []
    other = dist.new_group()
    late = DELAY_SECONDS if dist.get_rank() else 0.0
    for kind in ("waits", "overlaps", "thread"):
        dist.barrier()
        with waiting.step() as waited_seconds:
            if kind == "waits":
                time.sleep(late)
                dist.all_reduce(tensor)
            elif kind == "overlaps":
                time.sleep(late)
                work = dist.all_reduce(tensor, async_op=True)
                time.sleep(DELAY_SECONDS - late)
                work.wait()
            else:
                thread = threading.Thread(target=lambda: (time.sleep(late), dist.barrier(other)))
                thread.start()
                thread.join()
        seconds.append(waited_seconds())
    dist.all_reduce(tensor)  # not in a step
    with waiting.step() as waited_seconds:
        pass
    return [*seconds, waited_seconds()]


def test_waiting_is_what_occupies_the_rank_in_a_step() -> None:
    first, late = run_ranks(2, waited)
    assert first[0] > 0.9 * DELAY_SECONDS > late[0]
    assert first[2] == late[2] == first[3] == late[3] == 0.0
    assert first[1] < 0.9 * DELAY_SECONDS


def test_nothing_of_torch_stays_replaced() -> None:
    before = dict(vars(dist.Work)), dict(vars(dist.ProcessGroup))
    with pytest.raises(ValueError, match="in a step"), Waiting(torch.device("cpu"), 2).step():
        assert vars(dist.Work)["wait"] is not before[0]["wait"]
        raise ValueError("in a step")
    assert before == (dict(vars(dist.Work)), dict(vars(dist.ProcessGroup)))
