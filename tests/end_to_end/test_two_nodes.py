"""Two nodes, each with its own network, through the deepspeed launcher: with and without ssh."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from forked import Forked, train_forked
from processes import last_step, losses
from two_nodes import TwoNodes

RUN = ("parallel.pp=2", "checkpoint.interval_steps=0", "evaluation.num_samples=0", "training.num_steps=150")


def test_without_ssh(config: Path, tmp_path: Path) -> None:
    """The same losses as on one machine, bit for bit; a signal on the second node stops both."""
    run = tmp_path / "runs" / "test"
    with TwoNodes(tmp_path) as nodes:
        both = [nodes.start(node, run, config, *RUN) for node in (0, 1)]
        both[0].wait_for_step(10)
        both[1].process.send_signal(signal.SIGTERM)
        for started in both:
            assert started.end()[0] == 75, started.stderr()
        assert "run the same command again to resume" in both[0].stderr()
    found, one = losses(run), tmp_path / "runs" / "one"
    assert 10 <= len(found) < 150
    with Forked(tmp_path, one, 2, config, *RUN, "run.name=one") as forked:
        forked.wait_for_step(len(found))
    assert found == losses(one)[: len(found)]


@pytest.mark.soak
def test_both_nodes_go_on(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "test"
    with TwoNodes(tmp_path) as nodes:
        for step, code in ((3, 75), (150, 0)):
            both = [nodes.start(node, run, config, *RUN) for node in (0, 1)]
            if code:
                both[0].wait_for_step(step)
                both[0].process.send_signal(signal.SIGUSR1)
            for started in both:
                assert started.end()[0] == code, started.stderr()
    train_forked(tmp_path, tmp_path / "runs" / "one", 2, config, *RUN, "run.name=one")
    assert losses(run) == losses(tmp_path / "runs" / "one")


@pytest.mark.soak
def test_by_pdsh(config: Path, tmp_path: Path) -> None:
    """No value of a config is read by a shell on the way; a stop reaches nodes that no signal reaches."""
    run, canary = tmp_path / "runs" / "test", tmp_path / "canary"
    spoilt = f"data.text_column=a b'\"; touch {canary}; $(touch {canary}) `touch {canary}` #"
    with TwoNodes(tmp_path) as nodes:
        started = nodes.start_by_pdsh(run, config, *RUN, spoilt, "training.num_steps=3000")
        started.wait_for_step(2)
        started.process.send_signal(signal.SIGTERM)
        code, stderr = started.end()
        assert code == 75, stderr + nodes.output()
        assert f"stopped by the file {run / 'stop'}" in nodes.output(), nodes.output()
    assert not canary.exists()
    assert "touch" in (run / "config.yaml").read_text()


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["the cable is cut", "kill -9"])
def test_a_lost_node_is_named(config: Path, tmp_path: Path, fault: str) -> None:
    run = tmp_path / "runs" / "test"
    with TwoNodes(tmp_path) as nodes:
        limits = ("reliability.silence_seconds=5", "training.num_steps=100000")
        both = [nodes.start(node, run, config, *RUN, *limits) for node in (0, 1)]
        both[0].wait_for_step(3)
        start = time.monotonic()
        if fault == "kill -9":
            both[1].rank(1).kill()
        else:
            nodes.cut_the_cable()
        codes = [started.end()[0] for started in both]
        assert not {0, 2, 75} & set(codes), codes
        assert time.monotonic() - start < 30
        word = "is lost: its process has ended" if fault == "kill -9" else "has been silent for 5 s"
        assert "rank 1 (process " in both[0].stderr() and " on node1)" in both[0].stderr(), both[0].stderr()
        assert word in both[0].stderr()


@pytest.mark.soak
def test_a_node_that_never_comes(config: Path, tmp_path: Path) -> None:
    with TwoNodes(tmp_path) as nodes:
        limits = ("reliability.collective_seconds=8",)
        first = nodes.start(0, tmp_path / "runs" / "test", config, *RUN, *limits)
        code, stderr = first.end()
        assert code == 2, stderr
        assert "rank 0 did not meet all 2 processes at 10.77.0.1:" in stderr and "docs/many_machines.md" in stderr
        assert "Traceback" not in stderr


@pytest.mark.soak
def test_a_job_of_two_nodes(config: Path, tmp_path: Path) -> None:
    """What a Slurm job runs on each node, with the variables that Slurm sets there."""
    arguments = [str(config), *RUN, "training.num_steps=5"]
    job = f"from megastruct.launch.slurm import TrainingJob; print(TrainingJob({arguments!r}, 2, 1)())"
    with TwoNodes(tmp_path) as nodes:
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": ",".join(nodes.addresses), "SLURM_JOB_NUM_NODES": "2"}
        slurm |= {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_NTASKS": "2"}
        tasks = [nodes.run_python(n, job, **slurm, SLURM_NODEID=str(n), SLURM_PROCID=str(n)) for n in (0, 1)]
        for task in tasks:
            output, _ = task.communicate(timeout=120)
            assert output.splitlines()[-1] == "finished", output
    assert last_step(tmp_path / "runs" / "test") == 5
