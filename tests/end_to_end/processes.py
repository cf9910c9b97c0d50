"""Runs as users start them: processes, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Corpus:
    text: Path
    tokenizer: Path
    tokens: Path


def run_tool(name: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, arguments)], check=True, capture_output=True)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(*arguments: Any, module: str = "megastruct.start") -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def start_and_kill(run: Path, step: int, *arguments: Any) -> None:
    """Run until `step` is in the metrics, then kill -9 every process at once."""
    command = [sys.executable, "-m", "megastruct.start", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _wait_for_step(process, run, step)
    os.killpg(process.pid, 9)
    process.wait()


def start_and_terminate(run: Path, step: int, *arguments: Any) -> tuple[int, str]:
    """Run until `step` is in the metrics, then SIGTERM the starting process alone: (exit code, stderr)."""
    command = [sys.executable, "-m", "megastruct.start", *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)
    _wait_for_step(process, run, step)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def _wait_for_step(process: subprocess.Popen[Any], run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def last_step(run: Path) -> int:
    records = read_metrics(run)
    return records[-1]["step"] if records else 0


def read_metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run)]
