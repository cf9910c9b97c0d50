"""A start that is killed or stopped while its ranks do not exist yet, and a launcher whose ranks end with it.

Real processes; what stands for the ranks imports no torch.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A launcher that starts one rank, which says that it is there; both hold the pipe until they end.
LAUNCHER = """
import subprocess, sys
rank = "from megastruct.processes import end_with_launcher; end_with_launcher(); "
rank += "print('rank', flush=True); import time; time.sleep(600)"
subprocess.run([sys.executable, "-c", rank])
"""
COMMAND = """
import os, subprocess, sys
from pathlib import Path
from megastruct.launch.launcher import launcher_command
stop_file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
subprocess.run(launcher_command("a_launcher", [], stop_file))
"""


def start(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    (folder / "a_launcher.py").write_text(LAUNCHER)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=folder, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"rank\n"
    return process


def test_no_rank_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None and not select.select([process.stdout], [], [], 0.5)[0]
    process.kill()
    assert select.select([process.stdout], [], [], 30.0)[0] and process.stdout.read() == b""


def test_ranks_that_were_reached_by_ssh_are_asked_by_the_stop_file(tmp_path: Path) -> None:
    process, deadline = start(tmp_path, tmp_path / "stop"), time.monotonic() + 30
    assert not (tmp_path / "stop").exists()
    process.kill()
    while not (tmp_path / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_start_that_is_stopped_before_its_ranks_exist(number: int, tmp_path: Path) -> None:
    """And it says something before that. It waits for its tokenizer, a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "tokenizer.model")
    (tmp_path / "text.txt").write_text("a document")
    data = ["data.kind=text", f"data.path={tmp_path}/text.txt", f"data.tokenizer={tmp_path}/tokenizer.model"]
    command = [sys.executable, "-m", "megastruct.start", "configs/run/quickstart.yaml", "run.name=never", *data]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    heeded = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 - also where these tests are run by `nohup`
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("configs/run/quickstart.yaml: checking")
    process.send_signal(number)
    assert process.stderr.read() == f"stopped by {signal.Signals(number).name} before the run was started\n"
    assert process.wait() == 75


def test_a_hangup_is_ignored_where_the_caller_ignores_it() -> None:
    script = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from megastruct.stops import ends_when_asked\n"
        "with ends_when_asked(): os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == "goes on\n"
