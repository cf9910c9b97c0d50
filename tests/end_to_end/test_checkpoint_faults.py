"""Faults that happen to processes while they save, and to what they saved: nothing that was complete is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import ROOT, Started, environment, losses, start

# A checkpoint of 20 MB: long enough on its way to be met there.
LARGER = ("model.hidden_size=256", "model.ffn_hidden_size=1024", "ffn.structure=dense", "ffn.rank=null")
TWO_RANKS = (*LARGER, "parallel.dp=2")


class Saving(Started):
    """A run that is met while it saves."""

    def stop_in_a_save(self) -> Path:
        """Stop all processes when a save is on its way that needs every rank to go on, after one is complete."""
        while True:
            self.wait_for(lambda: self._on_its_way() and list(self.checkpoints.glob("step_*")))
            self.signal_all(signal.SIGSTOP)
            time.sleep(0.1)  # until all have stopped
            folder = self._on_its_way()
            if folder and not (folder / ".metadata").exists():
                return folder
            self.signal_all(signal.SIGCONT)
            self.wait_for(lambda: self._on_its_way() is None)

    def _on_its_way(self) -> Path | None:
        return next(self.checkpoints.glob(".step_*.writing"), None)


def complete(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def one_message(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    return result.stderr


@pytest.mark.soak
def test_killed_while_saving(config: Path, tmp_path: Path) -> None:
    """First one rank, then all at once; each time the newest complete checkpoint is used, bit for bit."""
    arguments = (config, *TWO_RANKS, "training.num_steps=24")
    assert start(*arguments, "run.name=undisturbed").returncode == 0
    run = tmp_path / "runs" / "killed"

    one = Saving(run, *arguments, "run.name=killed")
    torn, before = one.stop_in_a_save(), complete(run)
    one.rank(1).kill()
    one.signal_all(signal.SIGCONT)
    assert one.process.wait(timeout=120) != 0
    assert complete(run) == before and torn.name.split(".")[1] not in before

    every = Saving(run, *arguments, "run.name=killed")
    every.wait_for(lambda: not torn.exists())  # the next save has removed what the first one left
    torn, before = every.stop_in_a_save(), complete(run)
    every.signal_all(signal.SIGKILL)
    every.process.wait()
    assert complete(run) == before and torn.exists()

    result = start(*arguments, "run.name=killed")
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {int(before[-1].removeprefix('step_'))}" in result.stdout
    assert losses(run) == losses(tmp_path / "runs" / "undisturbed")
    assert not torn.exists() and complete(run) == ["step_00000021", "step_00000024"]


@pytest.mark.soak
def test_a_file_that_may_not_be_written(config: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands for a full disk or a quota: the write is refused half-way."""
    run = tmp_path / "runs" / "test"
    first = Saving(run, config, *TWO_RANKS)
    first.wait_for(lambda: complete(run))
    first.signal_all(signal.SIGKILL)
    first.process.wait()
    before = complete(run)

    command = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "limited", sys.executable, "-m", "megastruct.start"]
    result = subprocess.run(
        [*command, str(config), *TWO_RANKS], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    text = one_message(result)
    assert "could not be written: File too large" in text and f"{before[-1]} is complete" in text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before, "something is left"
    assert start(config, *TWO_RANKS).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB below the run folder, where this process may mount one."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.soak
def test_a_full_disk(config: Path, small_disk: Path) -> None:
    """One checkpoint fits, two do not; with more room the same command goes on."""
    text = one_message(start(config, *TWO_RANKS))
    assert "No space left on device" in text and "step_00000003 is complete" in text
    run = small_disk / "test"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    result = start(config, *TWO_RANKS)
    assert result.returncode == 0 and "resuming after step 3" in result.stdout
    assert [step for step, _ in losses(run)] == list(range(1, 13))


@pytest.mark.soak
def test_a_cut_off_checkpoint_is_passed_over(config: Path, tmp_path: Path) -> None:
    """Also the last one of a run that had finished."""
    assert start(config, "parallel.dp=2").returncode == 0
    run = tmp_path / "runs" / "test"
    undisturbed = losses(run)
    file = run / "checkpoints" / "step_00000012" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    result = start(config, "parallel.dp=2")
    assert result.returncode == 0, result.stderr
    assert "resuming after step 9" in result.stdout
    assert result.stderr.count("step_00000012: damaged: __0_0.distcp has") == 1
    assert losses(run) == undisturbed
    assert complete(run) == ["step_00000009", "step_00000012", "step_00000012.damaged"]
