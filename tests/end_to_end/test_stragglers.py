"""The metrics name the slowest rank and the part of the step in which it is slow, on every layout."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from forked import train_forked
from marks import always
from megastruct.data.prefetch import Prefetched
from megastruct.models.mlp import MLP
from processes import read_metrics

DELAY_SECONDS = 0.25
LAYOUTS = {
    "replicas": (2, ["parallel.dp=2"]),
    "zero2": (2, ["parallel.dp=2", "parallel.zero_stage=2"]),
    "zero3": (2, ["parallel.dp=2", "parallel.zero_stage=3"]),
    "stages": (2, ["parallel.pp=2"]),
    "tensor": (2, ["parallel.tp=2"]),
    "all": (8, ["parallel.pp=2", "parallel.dp=2", "parallel.tp=2"]),
}


def delay(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, rank: int) -> None:
    """Sleep in every call of the method in the process of one rank, which is forked from this one."""
    before = getattr(owner, method)

    def slow(*args: Any) -> Any:
        if os.environ.get("RANK") == str(rank):
            time.sleep(DELAY_SECONDS)
        return before(*args)

    monkeypatch.setattr(owner, method, slow)


CASES = [(layout, part) for layout in LAYOUTS for part in ("compute", "data_wait")]


@pytest.mark.parametrize(("layout", "part"), always(CASES, [("stages", "compute"), ("zero3", "data_wait")]))
def test_the_slowest_rank_and_its_part(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, part: str
) -> None:
    world_size, options = LAYOUTS[layout]
    slow = world_size - 1
    delay(monkeypatch, *((MLP, "forward") if part == "compute" else (Prefetched, "__next__")), slow)
    often = ["training.num_steps=4", "logging.interval_steps=2", "evaluation.num_samples=0"]
    train_forked(tmp_path, run := tmp_path / "runs" / "test", world_size, config, *options, *often)
    _, record = read_metrics(run)  # the first one has the first step, in which every rank may be slow
    micro_batches = 8 // 2 // (2 if "parallel.dp=2" in options else 1)
    blocks = 2 // (2 if "parallel.pp=2" in options else 1) if part == "compute" else 1
    least = micro_batches * blocks * DELAY_SECONDS * 0.9
    other = "data_wait" if part == "compute" else "compute"
    assert record["slowest_rank"] == slow, record
    assert record[f"slowest_{part}_seconds"] > least, record
    lost = {name: record[f"slowest_{name}_seconds"] - record[f"median_{name}_seconds"] for name in (part, other)}
    assert lost[part] > lost[other], record


def test_a_rank_alone_has_no_such_metrics(config: Path, tmp_path: Path) -> None:
    train_forked(tmp_path, run := tmp_path / "runs" / "test", 1, config, "training.num_steps=1")
    assert not any("slowest" in key for record in read_metrics(run) for key in record)
