"""Runs as users start them: processes, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Corpus:
    text: Path
    tokenizer: Path
    tokens: Path


def run_tool(name: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, arguments)], check=True, capture_output=True)


def write_config(folder: Path, corpus: Corpus) -> Path:
    """The config of a run of 12 steps on the token shards, which writes below `folder`."""
    path = folder / "config.yaml"
    path.write_text(
        f"""
run: {{name: test, folder: {folder / "runs"}}}
model: {{hidden_size: 32, num_layers: 2, num_attention_heads: 4, ffn_hidden_size: 64, vocab_size: 320}}
ffn: {{structure: lowrank, rank: 8}}
data: {{kind: tokens, path: {corpus.tokens}}}
training: {{seq_length: 32, global_batch_size: 8, micro_batch_size: 2, num_steps: 12, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
evaluation: {{interval_steps: 6, num_samples: 8}}
logging: {{interval_steps: 1}}
checkpoint: {{interval_steps: 3, keep: 2}}
"""
    )
    return path


def copy_of_the_project(folder: Path) -> Path:
    """Tracked files and new ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(*arguments: Any, module: str = "megastruct.start") -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


class Started:
    """A run in a process group of its own."""

    def __init__(
        self,
        run: Path,
        *arguments: Any,
        below: Sequence[str] = (),
        extra: Mapping[str, str] | None = None,
        module: str = "megastruct.start",
    ) -> None:
        """`below`: a command that runs it; `extra`: more of an environment."""
        self.run, self.checkpoints = run, run / "checkpoints"
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as this object
        self.process = subprocess.Popen(
            [*below, sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**environment(), **(extra or {})},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )

    def signal_all(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def rank(self, rank: int) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.environ().get("RANK") == str(rank))

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, f"the run ended before it could be stopped\n{self.stderr()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: last_step(self.run) >= step)

    def end(self) -> tuple[int, str]:
        """Wait for the end: (exit code, stderr)."""
        return self.process.wait(timeout=120), self.stderr()

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()


def start_and_kill(run: Path, step: int, *arguments: Any) -> None:
    """Run until `step` is in the metrics, then kill -9 every process at once."""
    started = Started(run, *arguments)
    started.wait_for_step(step)
    started.signal_all(9)
    started.process.wait()


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
