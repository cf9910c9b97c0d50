"""A run that is asked to stop finishes its step, saves, and ends with the code that asks for a new start."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from forked import Forked, train_forked
from processes import Corpus, Started, last_step, losses, start

# Long enough to be met in the middle, and saved only where it stops.
RUN = ("parallel.pp=2", "training.num_steps=120", "checkpoint.interval_steps=0", "evaluation.num_samples=0")


def stopped_step(run: Path, stderr: str) -> int:
    """The step after which a run stopped: said once, and saved."""
    assert "Traceback" not in stderr
    assert stderr.count("run the same command again to resume") == 1, stderr
    step = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    assert f"after step {step}, which is saved" in stderr
    assert last_step(run) == step
    return step


def test_stopped_and_resumed_is_the_undisturbed_run(config: Path, tmp_path: Path) -> None:
    """By a signal to what was started, to one rank, and by a file."""
    run, steps = tmp_path / "runs" / "test", [0]

    started = Started(run, config, *RUN)
    started.wait_for_step(2)
    started.process.send_signal(signal.SIGTERM)
    code, stderr = started.end()
    assert code == 75, stderr
    assert "SIGTERM received: the ranks finish their step, save and exit" in stderr
    steps.append(stopped_step(run, stderr))
    lines = stderr.splitlines()
    assert lines[-1].startswith("stopped by SIGTERM")  # nothing after it
    assert lines[0].endswith("checking the config, the data and the devices")
    titles = ["model", "layout", "devices", "data", "tokenizer", "training", "memory", "output", "warning"]
    assert [line.split()[0] for line in lines[1:10]] == titles
    assert "2 processes" in lines[3] and "120 steps, 30.7 k tokens" in lines[6] and str(run) in lines[8]
    assert "evaluation.num_samples: 0 with evaluation.interval_steps = 6: nothing would be validated" in lines[9]
    assert lines[10].startswith("step 1 done after ") and "data and first step" in lines[10]
    assert "  step 1/120  loss " in lines[11]

    def one_rank(forked: Forked) -> None:
        forked.signal(1, signal.SIGUSR1)

    def file(forked: Forked) -> None:
        assert not (run / "stop").exists()
        (run / "stop").touch()

    (run / "stop").touch()  # left from before: it does not stop the next run
    os.utime(run / "stop", (time.time() - 10, time.time() - 10))  # older than any process of it, however clocks tick
    for ask in (one_rank, file):
        with Forked(tmp_path, run, 2, config, *RUN) as forked:
            forked.wait_for_step(steps[-1] + 2)
            ask(forked)
            assert forked.codes() == [75, 75], forked.text()
            steps.append(stopped_step(run, forked.text()))
    assert not (run / "stop").exists()
    assert sorted(set(steps)) == steps and steps[-1] < 120

    train_forked(tmp_path, run, 2, config, *RUN)
    train_forked(tmp_path, tmp_path / "runs" / "undisturbed", 2, config, *RUN, "run.name=undisturbed")
    assert losses(run) == losses(tmp_path / "runs" / "undisturbed")


@pytest.mark.soak
@pytest.mark.parametrize("killed", ["the command", "the launcher"])
def test_no_rank_outlives_its_command(config: Path, tmp_path: Path, killed: str) -> None:
    started = Started(tmp_path / "runs" / "test", config, *RUN, "training.num_steps=100000")
    started.wait_for_step(1)
    ranks = [started.rank(rank) for rank in (0, 1)]
    (ranks[0].parent() if killed == "the launcher" else started.process).kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert started.end()[0] == (137 if killed == "the launcher" else -9)


@pytest.mark.soak
def test_torchrun_has_our_exit_codes(config: Path, tmp_path: Path) -> None:
    """Of a mistake, which is one message, and of a stop, after which nothing is printed."""
    torchrun = ("--standalone", "--nproc-per-node=2", "-m", "megastruct.train", config)
    result = start(*torchrun, "model.hiden_size=3", module="megastruct.torchrun")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr and "ChildFailedError" not in result.stderr
    started = Started(tmp_path / "runs" / "test", *torchrun, *RUN, module="megastruct.torchrun")
    started.wait_for_step(2)
    started.signal_all(signal.SIGTERM)
    code, stderr = started.end()
    assert code == 75 and stderr.splitlines()[-1].startswith("stopped by SIGTERM"), stderr


@pytest.mark.soak
def test_all_processes_are_signalled_at_once(config: Path, tmp_path: Path, corpus: Corpus) -> None:
    """A node that shuts down, a Slurm job without its own signal, Ctrl-C: neither the launchers nor the processes that
    tokenise must end the ranks."""
    run = tmp_path / "runs" / "test"
    text = ("data.kind=text", f"data.path={corpus.text}", f"data.tokenizer={corpus.tokenizer}", "data.num_workers=1")
    started = Started(run, config, *RUN, *text, "training.num_steps=2000")
    started.wait_for_step(2)
    started.signal_all(signal.SIGTERM)
    code, stderr = started.end()
    assert code == 75, stderr
    stopped_step(run, stderr)


@pytest.mark.soak
def test_asked_twice_ends_at_once(config: Path, tmp_path: Path) -> None:
    """Also where no step ends any more: the ranks are stopped."""
    run = tmp_path / "runs" / "test"
    started = Started(run, config, *RUN)
    started.wait_for_step(1)
    ranks = [started.rank(rank) for rank in (0, 1)]
    for rank in ranks:
        rank.suspend()
    started.process.send_signal(signal.SIGINT)
    started.wait_for(lambda: "send it again to kill the run" in started.stderr())
    time.sleep(1.2)  # one request may come as several signals within a second
    started.process.send_signal(signal.SIGINT)
    code, stderr = started.end()
    assert code not in (0, 75), stderr
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
