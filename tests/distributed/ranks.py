"""Real ranks for tests: processes over gloo, forked from a parent that has imported torch and DeepSpeed already.

A rank that starts from nothing spends seconds importing; a forked one starts at once. Each rank's output goes to a
file that is shown when a rank fails.

With DS_ACCELERATOR=cuda in the environment every rank has a GPU of its own, over NCCL. CUDA does not outlive a fork,
and other tests of the parent use it. So a server that has imported the same and never uses CUDA forks the ranks: every
case has new processes, which make their own CUDA contexts. Where a fork of the server cannot use its GPU, ranks start
from nothing. Tests that want more ranks than there are GPUs are skipped.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOG_LEVEL", "warning")

import deepspeed  # noqa: F401 - imported before the fork
import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx  # deepspeed.initialize imports it: seconds per rank, unless the parent has it
import torch.multiprocessing

from megastruct.engine.distributed import choose_device, join, leave
from megastruct.launch.environment import current_process, reserved_port

TIMEOUT_SECONDS = 240
ON_GPUS = os.environ["DS_ACCELERATOR"] == "cuda"
IMPORTED_IN = os.getpid()  # the process in which this code ran


def own_device() -> torch.device:
    """This rank's: its GPU, or the CPU."""
    return choose_device("auto", current_process())


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` ranks; their results, by rank. Raises if one fails or hangs."""
    if ON_GPUS and world_size > torch.cuda.device_count():
        pytest.skip(f"{world_size} ranks, {torch.cuda.device_count()} GPUs")
    torch.set_num_threads(1)
    context, environment = _context(), dict(os.environ)
    with TemporaryDirectory() as folder, reserved_port() as port:
        processes = [
            context.Process(target=_rank, args=(rank, world_size, port, Path(folder), environment, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        failure = _wait(processes)
        if failure:
            logs = "\n".join(
                f"-- rank {r}\n{(Path(folder) / f'log.{r}').read_text()[-3000:]}" for r in range(world_size)
            )
            raise AssertionError(f"{failure}\n{logs}")
        results = [Path(folder) / f"result.{rank}" for rank in range(world_size)]
        return [torch.load(result, map_location="cpu", weights_only=False) for result in results]


def _context() -> Any:
    """What starts ranks; with `Process`."""
    return _server_for_gpus() if ON_GPUS else torch.multiprocessing.get_context("fork")


@cache
def _server_for_gpus() -> Any:
    context = server()
    probe = context.Process(target=_use_gpu, args=(dict(os.environ),))
    probe.start()
    probe.join(TIMEOUT_SECONDS)
    if probe.exitcode == 0:
        return context
    probe.kill()
    print("ranks start from nothing: a fork of a server cannot use its GPU", file=sys.stderr)
    return torch.multiprocessing.get_context("spawn")


def server() -> Any:
    """Start the server, which imports this module; returns its context."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Without it `torch.cuda.is_available()`, which imports call, would initialise CUDA. The server gets no sys.path.
    with _environment(PYTORCH_NVML_BASED_CUDA_CHECK="1", PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def _use_gpu(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    works = not torch.cuda._is_in_bad_fork() and float(torch.ones(2, device="cuda").sum()) == 2.0
    os._exit(0 if works else 1)


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    yield
    os.environ.clear()
    os.environ.update(before)


def _wait(processes: list[Any]) -> str:
    start, failure = time.monotonic(), ""
    while any(process.is_alive() for process in processes) and not failure:
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(0.5)  # let the others say why, too
            failure = "a rank failed"
        elif time.monotonic() - start > TIMEOUT_SECONDS:
            failure = f"no end after {TIMEOUT_SECONDS} s"
        time.sleep(0.01)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    return failure or ("" if not any(codes) else f"exit codes {codes}")


def _rank(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    log = open(folder / f"log.{rank}", "w")  # noqa: SIM115 - until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.clear()  # a server's environment is from when it was started
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    code = 1
    try:
        join(own_device())
        torch.save(function(*arguments), folder / f"result.{rank}")
        leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
