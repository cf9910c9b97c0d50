"""Whole runs whose gradients are not finite in some steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from forked import Forked, train_forked
from megastruct import train
from processes import losses, read_metrics


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose gradient has a NaN, in one parameter of rank 1."""
    bad: set[int] = set()
    original = train.Run._train_step

    def train_step(self: Any, now: Any) -> float:
        if dist.get_rank() != 1 or self.step + 1 not in bad:
            return original(self, now)
        _, parameter = self.engine.named_parameters()[-1]
        handle = parameter.register_hook(lambda gradient: gradient * math.nan)
        loss = original(self, now)
        handle.remove()
        return loss

    monkeypatch.setattr(train.Run, "_train_step", train_step)
    return bad


def test_skipped_steps_are_counted_also_after_a_restart(config: Path, tmp_path: Path, bad_steps: set[int]) -> None:
    arguments = (config, "parallel.pp=2", "reliability.max_skipped_steps=1")
    bad_steps |= {5, 8}
    with Forked(tmp_path, tmp_path / "runs" / "test", 2, *arguments) as forked:
        assert forked.codes() == [2, 2], forked.text()
        text = forked.text()
        assert text.count("error: training: the loss is ") == 1 and "Traceback" not in text, text
        assert "at step 8, skipped step 2 of the run (reliability.max_skipped_steps = 1)" in text
        assert "step 6 is saved" in text  # the run waits for it

    bad_steps.remove(8)  # as if other data had come
    train_forked(tmp_path, tmp_path / "runs" / "test", 2, *arguments)
    train_forked(tmp_path, tmp_path / "runs" / "undisturbed", 2, *arguments, "run.name=undisturbed")
    records = read_metrics(tmp_path / "runs" / "test")
    assert [record["skipped_steps"] for record in records] == [0] * 4 + [1] * 8
    assert [record["step"] for record in records if record["grad_norm"] is None] == [5]
    assert losses(tmp_path / "runs" / "test") == losses(tmp_path / "runs" / "undisturbed")
