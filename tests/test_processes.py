"""Real processes: a child whose parent is killed, and the limits of open files."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

CHILD = (
    "import sys, time; from megastruct.processes import end_with_parent\n"
    "end_with_parent(int(sys.argv[1])); print('child', flush=True); time.sleep(600)"
)
PARENT = (
    "import os, subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]); time.sleep(600)"
)


def test_a_child_ends_with_its_parent_and_not_before() -> None:
    """Both hold the pipe: it ends when the last of them has ended."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert parent.stdout is not None and parent.stdout.readline() == b"child\n"
    assert not select.select([parent.stdout], [], [], 0.5)[0]
    parent.kill()
    parent.wait()
    assert select.select([parent.stdout], [], [], 30.0)[0] and parent.stdout.read() == b""


def test_a_child_whose_parent_ended_before_it_could_look_ends_at_once() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    child = subprocess.run([sys.executable, "-c", CHILD, str(ended.pid)], env=ENVIRONMENT, timeout=60)
    assert child.returncode == 1


LIMITS = """
import resource, sys
from megastruct.processes import allow_open_files
limit = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 400))
assert allow_open_files(50) == 100 and limit() == (100, 400)
assert allow_open_files(300) == 300 and limit() == (300, 400)
assert allow_open_files(200) == 300 and limit() == (300, 400)
assert allow_open_files(1000) == 400 and limit() == (400, 400)
files = [open(sys.executable) for _ in range(390)]
assert "torch" not in sys.modules
"""


def test_the_limit_of_open_files_is_raised_as_far_as_allowed_and_never_lowered() -> None:
    result = subprocess.run([sys.executable, "-c", LIMITS], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
