"""A run's ranks without a launcher: processes forked from one that has imported torch and DeepSpeed already.

They start in a second, and nobody but themselves ends them when one of them is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch._dynamo
import torch._inductor.compile_fx

from megastruct import train
from megastruct.launch.environment import reserved_port
from processes import last_step


class Forked:
    """The ranks of `megastruct.train ARGUMENTS`, or of another `main`. What still runs at its end is killed."""

    def __init__(
        self, folder: Path, run: Path, world_size: int, *arguments: Any, main: Callable[[list[str]], Any] = train.main
    ) -> None:
        """`folder`: for the ranks' output."""
        self.run, self.folder = run, folder
        context, self._reserved = multiprocessing.get_context("fork"), ExitStack()
        self.port = port = self._reserved.enter_context(reserved_port())
        self.ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, port, self.log(rank), [str(a) for a in arguments], main)
            )
            for rank in range(world_size)
        ]
        self.started = time.monotonic()
        for rank in self.ranks:
            rank.start()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: Any) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        self._reserved.close()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def text(self) -> str:
        return "\n".join(f"-- rank {rank}\n{self.log(rank).read_text()}" for rank in range(len(self.ranks)))

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(rank.exitcode is None for rank in self.ranks), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: last_step(self.run) >= step)

    def codes(self, *ranks: int, seconds: float = 120) -> list[int | None]:
        """The exit codes of these ranks, or of all, when they have ended or the time is over."""
        chosen = [self.ranks[rank] for rank in ranks] or self.ranks
        deadline = time.monotonic() + seconds
        for rank in chosen:
            rank.join(max(0.0, deadline - time.monotonic()))
        return [rank.exitcode for rank in chosen]


def train_forked(folder: Path, run: Path, world_size: int, *arguments: Any) -> None:
    """Train to the end."""
    with Forked(folder, run, world_size, *arguments) as forked:
        assert forked.codes() == [0] * world_size, forked.text()


def _rank(
    rank: int, world_size: int, port: int, log: Path, arguments: list[str], main: Callable[[list[str]], Any]
) -> None:
    sys.stdout = sys.stderr = file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    code: Any = 1
    try:
        main(arguments)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
