"""Starting calls no compiler: its complaints about libraries that a machine lacks would reach the user's screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

JOIN = """
import sys, torch
from megastruct.console import lasting_command
from megastruct.engine.distributed import join, leave
from megastruct.engine.internals import check_internals
from megastruct.launch.environment import current_process

@lasting_command
def main():
    current_process()
    check_internals()
    join(torch.device("cpu"))
    leave()

main()
"""


def test_no_compiler_is_called(tmp_path: Path) -> None:
    called = tmp_path / "called"
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho \"$@\" >> {called}\necho 'ld: cannot find -laio' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CC": str(compiler), "CXX": str(compiler)}
    result = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not called.exists(), called.read_text()
    assert "laio" not in result.stderr and "laio" not in result.stdout
