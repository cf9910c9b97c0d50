"""Jobs: what would be submitted, and the same job run here, preempted and requeued."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forked import train_forked
from megastruct.commands import submit
from processes import ROOT, environment, last_step, losses

RUN = ("parallel.pp=2", "training.num_steps=60", "checkpoint.interval_steps=0", "evaluation.num_samples=0")
RUN += ("hardware.device=cpu",)


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "submit.py"), str(config), *arguments]


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *arguments), capture_output=True, text=True, env=environment(), timeout=60)


def test_a_dry_run_shows_the_job_and_leaves_nothing(config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("--nodes", "2", "--gpus-per-node", "4", "--time", "1-02:00:30", "--partition", "a; touch /tmp/x")
    options += ("--slurm", "exclude=n[1-3]", "--signal-seconds", "300")
    options += ("training.global_batch_size=16", "evaluation.num_samples=16")
    options += ("--setup", "module load cuda", "--setup", "export X='a b'")
    result = run(config, *options, "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1561",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --requeue",
        "#SBATCH --job-name=test",
        "#SBATCH --partition='a; touch /tmp/x'",
        "#SBATCH --exclude='n[1-3]'",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --mem=17G",  # 4 GiB for each process, and a copy of this tiny model's state
    ):
        assert line in lines, f"{line}\n{result.stdout}"
    assert lines.index("module load cuda") + 1 == lines.index("export X='a b'") < lines.index("# command")
    srun = next(line for line in lines if line.startswith("srun "))
    assert shlex.split(srun)[-4:] == ["-u", "-m", "submitit.core._submit", str(tmp_path / "runs" / "test" / "jobs")]
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != ".lock"] == [
        tmp_path / "runs",
        tmp_path / "runs" / "test",
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--time", "soon"], "--time"),
        (["--time", "60", "--nodes", "3"], "training.global_batch_size"),
        (["--time", "60", "--slurm", "exclude"], "--slurm"),
        (["--time", "60", "--nodes", "2", "--local"], "--nodes 1"),
        (["--time", "60", "--local", "--setup", "module load cuda"], "--setup"),
        (["--time", "60"], "--dry-run"),  # no Slurm here
    ],
)
def test_mistakes(config: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    if part == "--dry-run" and any(Path(folder, "srun").exists() for folder in os.environ["PATH"].split(":")):
        pytest.skip("Slurm is installed")
    with pytest.raises(SystemExit) as exit_:
        submit.main([str(config), "--gpus-per-node", "2", *options])
    assert exit_.value.code == 2
    assert part in capsys.readouterr().err


def test_defaults_make_room_for_the_options_that_are_given(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--slurm", "mem-per-cpu=4G", "--slurm", "cpus-per-gpu=8"]
    submit.main([str(config), "--gpus-per-node", "2", "--time", "60", *given, "--dry-run"])
    text = capsys.readouterr().out
    assert "--mem=" not in text and "--cpus-per-task" not in text and "--mem-per-cpu=4G" in text


@pytest.mark.soak
def test_preempted_saved_requeued_finished(config: Path, tmp_path: Path) -> None:
    """The signal of a preemption, to the job's task as Slurm sends it; afterwards all is as without it."""
    folder = tmp_path / "runs" / "test"
    options = ("--gpus-per-node", "2", "--time", "60", "--local")
    submitted = subprocess.Popen(
        command(config, *RUN, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        deadline = time.monotonic() + 100
        while last_step(folder) < 3:
            assert submitted.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(submitted.pid).children(recursive=True)
        task = next(child for child in children if "submitit.core._submit" in child.cmdline())
        task.send_signal(signal.SIGUSR2)
        output, errors = submitted.communicate(timeout=120)
    finally:
        submitted.kill()
    log = next((folder / "jobs").glob("*_log.out")).read_text()
    assert submitted.returncode == 0 and output.splitlines()[-1] == "finished", f"{output}{errors}{log}"
    assert "this job is" in log and "Requeued job" in log, log
    assert log.count("run the same command again to resume") == 1 and "resuming after step" in log, log
    assert stat.S_IMODE((folder / "jobs").stat().st_mode) == 0o700

    train_forked(tmp_path, tmp_path / "runs" / "undisturbed", 2, config, *RUN, "run.name=undisturbed")
    assert losses(folder) == losses(tmp_path / "runs" / "undisturbed")
