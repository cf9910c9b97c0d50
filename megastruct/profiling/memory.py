"""Snapshots of the memory of a GPU: what was allocated, from which line of code, and what came before.

    runs/NAME/profile/memory_step_00000010_rank_0.pickle         after a chosen step
    runs/NAME/profile/memory_out_of_memory_rank_0.pickle         when the allocator found no memory

They are opened at https://pytorch.org/memory_viz. An error in the main thread would come too late: by then the memory
has been given back. PyTorch calls an observer instead, before it raises the error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megastruct.config.system import ProfilingConfig
from megastruct.profiling.files import write_file

MAX_ENTRIES = 100_000  # allocations and frees that are remembered, the newest; about 1 KB each with their stacks


class MemoryHistory:
    """Records allocations on this rank's GPU from now on, if the config asks for snapshots."""

    def __init__(self, config: ProfilingConfig, folder: Path, rank: int) -> None:
        """`folder`: where snapshots go. The rank's GPU is the current device."""
        self._steps, self._folder, self._rank = frozenset(config.memory_steps), folder, rank
        if config.takes_memory:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_ENTRIES)
        if config.memory_at_out_of_memory:
            torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)  # type: ignore[attr-defined]

    def after_step(self, step: int) -> None:
        """Write a snapshot if `step` is a chosen one."""
        if step in self._steps:
            self._write(f"memory_step_{step:08d}")

    def _out_of_memory(self, *_: Any) -> None:
        self._write("memory_out_of_memory")

    def _write(self, name: str) -> None:
        path = self._folder / f"{name}_rank_{self._rank}.pickle"
        write_file(path, lambda temporary: torch.cuda.memory._dump_snapshot(str(temporary)), "memory snapshot")
