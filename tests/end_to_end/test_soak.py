"""A run that is killed again and again, at moments that nobody chose, ends as if nothing had been."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from megastruct.checkpoint.store import complete_checkpoints
from processes import Started, last_step, losses, read_metrics, start

KILLS = 20
# Guided for 30 steps, which are read again at the end: borders to be killed at.
ARGUMENTS = ["training.num_steps=90", "guided.schedule=fixedflop", f"guided.fraction={1 / 3}", "guided.levels=4"]
ARGUMENTS += ["checkpoint.interval_steps=4", "parallel.pp=2"]
STEPS = list(range(1, 121))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_at_twenty_moments(config: Path, tmp_path: Path) -> None:
    undisturbed = start(config, "run.name=undisturbed", *ARGUMENTS)
    assert undisturbed.returncode == 0, undisturbed.stderr
    run, generator = tmp_path / "runs" / "killed", random.Random(0)
    reached = [_start_and_kill(generator, run, config, "run.name=killed", *ARGUMENTS) for _ in range(KILLS)]
    print("killed at steps", reached)
    assert len(set(reached)) > KILLS // 2 and max(reached) > 30, "it was hardly killed while it trained"
    last = start(config, "run.name=killed", *ARGUMENTS)
    assert last.returncode == 0, last.stderr
    wanted = tmp_path / "runs" / "undisturbed"
    assert [step for step, _ in losses(wanted)] == STEPS
    assert losses(run) == losses(wanted)
    assert _validation(run) == _validation(wanted)
    assert complete_steps(run) == complete_steps(wanted)


def _start_and_kill(generator: random.Random, run: Path, *arguments: object) -> int:
    """kill -9 of all processes, in one case of five while it starts, else up to 9 steps on: the step it had reached."""
    saved, events = max(complete_steps(run), default=0), _event_files(run)
    started = Started(run, *arguments)
    if generator.random() < 0.2:
        time.sleep(generator.uniform(0.0, 5.0))
    else:
        started.wait_for(lambda: _event_files(run) > events)  # the records of steps to be run again are gone by then
        target = saved + generator.randint(0, 9)
        started.wait_for(lambda: last_step(run) >= target)
        time.sleep(generator.uniform(0.0, 0.05))
    assert started.process.poll() is None, f"the run ended before it was killed\n{started.stderr()}"
    started.signal_all(signal.SIGKILL)
    started.process.wait()
    return last_step(run)


def complete_steps(run: Path) -> list[int]:
    return [step for step, _ in complete_checkpoints(run / "checkpoints")]


def _event_files(run: Path) -> int:
    return len(list(run.glob("events.out.tfevents.*")))


def _validation(run: Path) -> list[tuple[int, float]]:
    return [(each["step"], each["validation_loss"]) for each in read_metrics(run) if "validation_loss" in each]
