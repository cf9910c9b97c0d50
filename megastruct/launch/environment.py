"""All environment variables that this project reads or sets, in one place."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from megastruct.paths import user_cache

_BEGAN, _COMPILED = "MEGASTRUCT_BEGAN", "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Process:
    """The place of this process among all processes of the run."""

    rank: int
    local_rank: int
    world_size: int


def current_process() -> Process:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, which deepspeed or torchrun sets; without them this is rank 0 of 1."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    return Process(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))


def is_first_process() -> bool:
    """Whether this process is rank 0, or was not started as a rank; reads RANK and sets nothing."""
    return int(os.environ.get("RANK") or 0) == 0


def take_share_of_cores() -> int:
    """The number of threads for this process: OMP_NUM_THREADS if it is set, else its share of the machine's cores.

    Sets OMP_NUM_THREADS to the result, for libraries and for processes that this one starts. Otherwise every process
    would use all cores. Eight of them on a machine are then many times slower than one, above all at the start, when
    the first weights are decomposed.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // processes_on_this_node(1))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def began() -> dict[str, str]:
    """The variable that tells the ranks which this process starts when its command began: `seconds_since_start`."""
    return {_BEGAN: str(psutil.Process().create_time())}


def seconds_since_start() -> float:
    """Seconds since the command began that started this rank; without one on this machine, since the rank began."""
    own = psutil.Process().create_time()
    return time.time() - min(own, float(os.environ.get(_BEGAN, own)))


def keep_compiled_code(folder: str | None) -> None:
    """Have torch.compile keep its results in `folder`, or in the user's cache, unless TORCHINDUCTOR_CACHE_DIR is set.

    By itself it keeps them in the machine's folder for temporary files. A folder that cannot be written is left out,
    with a warning.
    """
    if _COMPILED in os.environ:
        return
    path = Path(folder) if folder else user_cache() / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if is_first_process():
            where = "hardware.compile_cache" if folder else "the user's cache"
            print(f"warning: {where}: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return
    os.environ[_COMPILED] = str(path.absolute())


def processes_on_this_node(world_size: int) -> int:
    """The ranks of this node, as their launcher says (deepspeed: LOCAL_SIZE, torchrun: LOCAL_WORLD_SIZE).

    Without a launcher it is `world_size`.
    """
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port of this machine, which the system gives to nobody else inside the context.

    Rank 0 can listen on it: two sockets may have a port with SO_REUSEADDR while at most one of them listens.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def describe_environment() -> dict[str, str]:
    """Versions of Python, the system and the main packages, and the git commit of this code."""
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
