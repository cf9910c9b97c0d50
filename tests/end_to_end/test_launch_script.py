"""The first command of the README, in a copy of the project, with nothing but the installed environment."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from marks import soak
from processes import ROOT, copy_of_the_project


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(["./launch.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("num_steps", [20, soak(100)])
def test_quick_start(tmp_path: Path, num_steps: int) -> None:
    """As it is in the soak; always with fewer steps."""
    folder = copy_of_the_project(tmp_path)
    quickstart = folder / "configs" / "run" / "quickstart.yaml"
    quickstart.write_text(quickstart.read_text().replace("num_steps: 100", f"num_steps: {num_steps}"))
    (folder / ".venv").symlink_to(ROOT / ".venv")  # so that nothing is installed again
    result = launch(folder)
    assert result.returncode == 0, result.stderr
    assert "tensorboard --logdir runs" in result.stdout
    assert "a few generated words:\nThe file" in result.stdout
    assert "Traceback" not in result.stderr
    assert "warning" not in (result.stderr + result.stdout).lower()  # DeepSpeed's are on the standard output
    records = [json.loads(line) for line in (folder / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validation[-1] < 7.0  # a uniform guess over 2,048 tokens is 7.6

    if num_steps < 100:
        return
    assert validation[-1] < min(5.0, validation[0] - 0.5)
    start = time.monotonic()
    again = launch(folder)
    assert again.returncode == 0 and f"is finished: {num_steps} steps are done" in again.stdout
    assert time.monotonic() - start < 60


def test_a_linked_environment_is_not_installed_into(tmp_path: Path) -> None:
    """It belongs to another checkout, whose commands would become those of this one."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/installed\n")
    python.chmod(0o755)
    (tmp_path / ".venv").symlink_to("other")
    result = subprocess.run(["bash", tmp_path / "tools" / "setup.sh"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.startswith("warning: other has the packages of another version")
    assert not (tmp_path / "installed").exists() and not (tmp_path / "other" / ".installed").exists()
