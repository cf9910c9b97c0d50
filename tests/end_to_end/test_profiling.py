"""Traces of a run's steps, and the collectives of ranks that hang: files, and training as without them."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pytest

from forked import Forked, train_forked
from marks import soak
from megastruct.profiling.breakdown import breakdown
from megastruct.profiling.parts import Part
from megastruct.profiling.trace import read_trace
from processes import read_metrics

RUN = ("evaluation.num_samples=0", "checkpoint.interval_steps=4", "schedule.num_steps=8")


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run)]


@pytest.mark.parametrize("tp", [1, soak(2)])
def test_traced_steps_train_as_others_and_a_resumed_run_traces_others(config: Path, tmp_path: Path, tp: int) -> None:
    run, plain, last = tmp_path / "runs" / "test", tmp_path / "runs" / "plain", tp - 1
    keys = (*RUN, f"parallel.tp={tp}")
    train_forked(tmp_path, plain, tp, config, *keys, "training.num_steps=8", "run.name=plain")
    traced = ("profiling.steps=[2,4]", f"profiling.ranks={[*range(tp)]}")
    with Forked(tmp_path, run, tp, config, *keys, *traced, "training.num_steps=4") as forked:
        assert forked.codes() == [0] * tp, forked.text()
        said = forked.text()
    first = {f"step_{step:08d}_rank_{rank}.json.gz" for step in (2, 4) for rank in range(tp)}
    assert {path.name for path in (run / "profile").iterdir()} == first
    assert all(f"trace: {run / 'profile' / name}" in said for name in first)
    before = {name: (run / "profile" / name).stat().st_mtime_ns for name in first}
    train_forked(
        tmp_path, run, tp, config, *keys, "training.num_steps=8", "profiling.steps=[6]", f"profiling.ranks=[{last}]"
    )
    assert {path.name for path in (run / "profile").iterdir()} == {*first, f"step_00000006_rank_{last}.json.gz"}
    assert before == {name: (run / "profile" / name).stat().st_mtime_ns for name in first}
    assert losses(run) == losses(plain)
    found = breakdown(read_trace(run / "profile" / f"step_00000004_rank_{last}.json.gz"))
    computed = {Part.PRODUCTS, Part.ATTENTION, Part.LOSS, Part.GRADIENT_ACCUMULATION, Part.OPTIMIZER, Part.ELEMENT_WISE}
    assert {part for part, spent in found.parts.items() if spent.total} >= {*computed, Part.NOTHING}
    assert tp == 1 or found.parts[Part.COLLECTIVES].counted > 0
    assert found.num_steps == 1


def test_the_rank_that_is_left_writes_down_its_collectives(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "test"
    arguments = (RUN[0], "parallel.tp=2", "training.num_steps=3000", "profiling.flight_recorder_entries=7")
    with Forked(tmp_path, run, 2, config, *arguments) as forked:
        forked.wait_for_step(2)
        forked.signal(0, signal.SIGKILL)
        assert forked.codes(1) == [1]
        path = run / "profile" / "collectives_rank_1"
        assert f"collectives: {path}" in forked.text()
    assert [path.name for path in (run / "profile").iterdir()] == ["collectives_rank_1"]
    recorded = pickle.loads(path.read_bytes())  # noqa: S301, written by this run
    assert len(recorded["entries"]) == 7 and "gloo:all_reduce" in {e["profiling_name"] for e in recorded["entries"]}
