"""Commands whose output is closed, full or without Unicode: real processes, pipes and devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PRINTING = """
import sys
from megastruct.console import {kind} as kind
@kind
def main():
    print("größer ∞", flush=True)
    for number in range(100_000): print(number)
    print("the end", file=sys.stderr)
main()
"""


def python(script: str, *options: str, **keywords: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **keywords.pop("environment", {})}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    return subprocess.Popen([sys.executable, *options, "-c", script], env=environment, **pipes)


@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize(("kind", "code"), [("command", 141), ("lasting_command", 0)])
def test_a_closed_pipe_ends_a_command_and_not_a_run(options: tuple[str, ...], kind: str, code: int) -> None:
    process = python(PRINTING.format(kind=kind), *options)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().decode() == "größer ∞\n"
    process.stdout.close()
    assert process.stderr.read() == (b"the end\n" if code == 0 else b"")
    assert process.wait() == code


@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize(("kind", "code"), [("command", 2), ("lasting_command", 0)])
def test_a_full_disk_is_one_message_and_does_not_end_a_run(options: tuple[str, ...], kind: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        process = python(PRINTING.format(kind=kind), *options, stdout=full)
    text = process.communicate()[1].decode()
    assert text == ("the end\n" if code == 0 else "error: stdout cannot be written: No space left on device\n")
    assert process.returncode == code


def test_closed_streams_are_no_error() -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f'"{sys.executable}" -c "$0" {closed}'
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(["sh", "-c", command, PRINTING.format(kind="command")], env=environment, timeout=60)
        assert result.returncode == 0, closed


def test_a_terminal_without_unicode_gets_escapes_and_its_input_is_read() -> None:
    script = "from megastruct.console import command\n@command\ndef main(): print(ascii(input()), 'ü')\nmain()"
    process = python(script, stdin=subprocess.PIPE, environment={"PYTHONIOENCODING": "ascii"})
    assert process.communicate("für".encode())[0] == b"'f\\xfcr' \\xfc\n"


def test_every_command_is_decorated() -> None:
    for path in (ROOT / "megastruct" / "commands").glob("*.py"):
        text = path.read_text()
        assert text.count("\n@command\ndef main(") == text.count("\ndef main("), path


@pytest.mark.parametrize("tool", [["plan.py", "configs/run/s_dense.yaml"], ["plot_runs.py", "--help"]])
def test_a_tool_whose_reader_has_gone(tool: list[str]) -> None:
    """The smallest real case: the pipe is closed before anything is printed."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, ROOT / "tools" / tool[0], *tool[1:]], cwd=ROOT, stdout=write, stderr=-1)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")
