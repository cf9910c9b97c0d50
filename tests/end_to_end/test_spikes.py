"""A batch that makes the loss jump: the run goes back, and never reads that data again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import Forked, train_forked
from megastruct import train
from processes import losses, read_metrics

SPIKE = ("reliability.spike_factor=1.1", "reliability.spike_window_steps=2", "checkpoint.keep=4")
BAD_BATCH, SAVED = 8, 6


@pytest.fixture
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Positions in the data, in steps from 1, at which every label is one token that the corpus does not have."""
    bad: set[int] = set()
    original = train.Run._timed

    def timed(self: Any, reader: Any) -> Iterator[Any]:
        for batch in original(self, reader):
            if self.step + self.divergence.skipped_data_steps + 1 in bad:
                batch.labels.fill_(319)
            yield batch

    monkeypatch.setattr(train.Run, "_timed", timed)
    return bad


def skip_by_hand(run: Any) -> None:
    """As the run goes on after the spike: after step SAVED, with the data after BAD_BATCH."""
    if run.step == SAVED and not run.divergence.skipped_data_steps:
        run.divergence.skipped_data_steps = BAD_BATCH - SAVED
        run.sample += run.batch_size * (BAD_BATCH - SAVED)
        if run.engine.reads_data:
            run.reader = run._open_reader(None)


LAYOUTS = [
    ("parallel.pp=2",),
    ("parallel.dp=2", "parallel.zero_stage=3"),
    pytest.param(("parallel.dp=2", "parallel.zero_stage=0"), marks=pytest.mark.soak),
    pytest.param(("parallel.dp=2", "parallel.zero_stage=2", "training.precision=bf16"), marks=pytest.mark.soak),
    pytest.param(("parallel.tp=2", "training.precision=bf16"), marks=pytest.mark.soak),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spike_is_gone_back_from_and_its_data_skipped(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_batches: set[int], layout: tuple[str, ...]
) -> None:
    run, arguments = tmp_path / "runs" / "test", (config, *SPIKE, *layout)
    bad_batches.add(BAD_BATCH)
    with Forked(tmp_path, run, 2, *arguments) as forked:
        assert forked.codes() == [0, 0], forked.text()
        assert forked.text().count("continuing from step 6 with later data") == 1, forked.text()
        assert "step 8: loss spike (" in forked.text()
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["skipped_data_steps"] for record in records] == [0] * SAVED + [BAD_BATCH - SAVED] * SAVED
    state = json.loads((run / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert (state["spikes"], state["skipped_data_steps"]) == (1, 2)
    per_step = records[0]["training_flops"]
    assert state["spent"]["training_flops"] == BAD_BATCH * per_step  # the steps up to the spike have been paid for
    assert records[-1]["training_flops"] == (BAD_BATCH + 12 - SAVED) * per_step
    first = losses(run)

    for step in (9, 12):  # a restart before the next checkpoint
        shutil.rmtree(run / "checkpoints" / f"step_{step:08}")
    train_forked(tmp_path, run, 2, *arguments)
    assert losses(run) == first
    assert read_metrics(run)[-1]["training_flops"] == records[-1]["training_flops"]

    bad_batches.clear()
    original = train.Run._train_step
    monkeypatch.setattr(train.Run, "_train_step", lambda self, now: (skip_by_hand(self), original(self, now))[1])
    train_forked(tmp_path, tmp_path / "runs" / "by_hand", 2, *arguments, "run.name=by_hand")
    assert losses(tmp_path / "runs" / "by_hand") == first


def test_too_many_spikes_end_the_run(config: Path, tmp_path: Path, bad_batches: set[int]) -> None:
    bad_batches |= {BAD_BATCH, BAD_BATCH + 3}
    arguments = (config, *SPIKE, "parallel.pp=2", "reliability.max_spikes=1")
    with Forked(tmp_path, tmp_path / "runs" / "test", 2, *arguments) as forked:
        assert forked.codes() == [2, 2], forked.text()
        assert "the run has already gone back once (reliability.max_spikes = 1)" in forked.text(), forked.text()
        assert "Traceback" not in forked.text()
