"""Cyclic garbage is collected at the same steps on all ranks, and at no others; it does not pile up."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import train_forked
from marks import always
from megastruct import train
from megastruct.models.mlp import MLP
from processes import losses, read_metrics

INTERVAL_STEPS = 3
RANKS = {
    "replicas": ["parallel.dp=2"],
    "zero3": ["parallel.dp=2", "parallel.zero_stage=3"],
    "stages": ["parallel.pp=2"],
    "guided": ["parallel.pp=2", "guided.schedule=fixedstep", "guided.fraction=0.5", "guided.levels=4"],
}


class Cycle:
    """Garbage as a step may leave it: a tensor that only the collector frees."""

    def __init__(self) -> None:
        self.own, self.tensor = self, torch.zeros(1000)


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Has every rank write its collections after the first step as (finished steps, generation), and the largest number
    of cycles that were alive, while every forward of an MLP leaves one."""
    after: list[tuple[int, int]] = []
    alive, most = weakref.WeakSet[Cycle](), 0
    forward, finished, trained = MLP.forward, train.AlignedCollection.finished, train.Run.train
    runs: list[train.Run] = []

    def slack(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        alive.add(Cycle())
        most = max(most, len(alive))
        return forward(*args, **kwargs)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            after.append((runs[0].step, info["generation"]))

    def collect(own: Any, step: int) -> None:
        finished(own, step)
        if note not in gc.callbacks:
            gc.callbacks.append(note)

    def run(own: train.Run) -> bool:
        runs.append(own)
        done = trained(own)
        gc.callbacks.remove(note)
        (tmp_path / f"collections.{os.environ['RANK']}").write_text(json.dumps([after, most]))
        return done

    monkeypatch.setattr(MLP, "forward", slack)
    monkeypatch.setattr(train.AlignedCollection, "finished", collect)
    monkeypatch.setattr(train.Run, "train", run)
    return tmp_path


@pytest.mark.parametrize("layout", always(RANKS, ["guided"]))
def test_collections_of_all_ranks_come_after_the_same_steps(config: Path, collections: Path, layout: str) -> None:
    own = [*RANKS[layout], "checkpoint.interval_steps=2"]
    interval = f"reliability.gc_interval_steps={INTERVAL_STEPS}"
    train_forked(collections, collections / "runs" / "test", 2, config, *own, interval)
    steps = [3, 6, 9, 12]
    if layout == "guided":  # the engine is built anew after half of the steps, and collected after the next one
        steps = [3, 6, 6, 7, 9, 12]
    for rank in range(2):
        after, most = json.loads((collections / f"collections.{rank}").read_text())
        assert after == [[step, 2] for step in steps], rank
        blocks, micro_batches = (2, 2) if "parallel.dp=2" in own else (1, 4)
        of_validation = 2 * blocks * micro_batches  # the validations after steps 6 and 12
        assert most <= INTERVAL_STEPS * blocks * micro_batches + of_validation + 1, rank
    train_forked(
        collections, collections / "runs" / "off", 2, config, *own, "run.name=off", "reliability.gc_interval_steps=0"
    )
    assert losses(collections / "runs" / "test") == losses(collections / "runs" / "off")
    assert len(read_metrics(collections / "runs" / "off")) == 12
