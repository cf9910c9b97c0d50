"""Whether what the section `profiling` asks for can be had: known steps, ranks and devices."""

from __future__ import annotations

from collections.abc import Iterator

from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.planning.steps import total_steps


def profiling_problems(config: Config, world_size: int, device_type: str | None) -> Iterator[Problem]:
    """Steps after the last one, ranks that do not exist, and memory snapshots without a GPU.

    `device_type`: "cuda" or "cpu", None if this machine does not show it.
    """
    profiling, total = config.profiling, total_steps(config)
    for key in ("steps", "memory_steps"):
        late = [step for step in getattr(profiling, key) if step > total]
        if late:
            found = f"{', '.join(map(str, late))} {'is' if len(late) == 1 else 'are'} after the last step"
            yield Problem(f"profiling.{key}", f"{found}, {total}", f"profiling.{key}=[{total}]")
    if profiling.is_on and (missing := [rank for rank in profiling.ranks if rank >= world_size]):
        found = f"there is no rank {', '.join(map(str, missing))}: there are {world_size}, from 0 on"
        yield Problem("profiling.ranks", found, "profiling.ranks=[0]")
    if device_type == "cpu":
        for key, off in (("memory_steps", "[]"), ("memory_at_out_of_memory", "false")):
            if getattr(profiling, key):
                found = "the run is on a CPU, and PyTorch records only the memory of GPUs"
                yield Problem(f"profiling.{key}", found, f"profiling.{key}={off}, or profiling.steps for a trace")
