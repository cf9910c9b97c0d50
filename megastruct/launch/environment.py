"""The environment variables that this project reads or sets, all in one place."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """This process among all: set by the deepspeed launcher, torchrun, or (alone) by nobody."""

    rank: int
    local_rank: int
    world_size: int


def current_process() -> Process:
    """From RANK, LOCAL_RANK and WORLD_SIZE; a process that nobody launched is rank 0 of 1."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    return Process(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))


def take_share_of_cores() -> int:
    """How many threads this process should compute with: OMP_NUM_THREADS if it is set, else its share of the cores.
    OMP_NUM_THREADS is set to it, for the libraries of the processes that this one starts.

    Left to itself every process takes all cores. Eight of them on a machine are then many times slower than one, above
    all at the start, when the first weights are decomposed.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # LOCAL_SIZE is the deepspeed launcher's, LOCAL_WORLD_SIZE torchrun's.
    threads = max(1, cores // int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def describe_environment() -> dict[str, str]:
    """Versions and the git commit of the code that runs, for the run folder."""
    names = ("megastruct", "torch", "deepspeed", "datasets", "sentencepiece", "numpy")
    versions = {name: _version(name) for name in names}
    return {"python": sys.version.split()[0], "system": platform.platform(), **versions, "git_commit": _git_commit()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
