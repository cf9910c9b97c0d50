"""What autograd keeps, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def saved_bytes(run: Callable[[], Any], weights: list[nn.Parameter]) -> int:
    """Bytes of all storages that autograd keeps for a backward, without the weights.

    Run twice with both kept: what has the same address in both is no activation but a table made once.
    """
    kept: list[Any] = []
    storages: list[dict[int, int]] = []
    for _ in range(2):
        found: dict[int, int] = {}

        def pack(t: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            kept.append(t)
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept.append(run())
        storages.append(found)
    known = {p.untyped_storage().data_ptr() for p in weights} | set(storages[0])
    return sum(size for address, size in storages[1].items() if address not in known)


def held_bytes(run: Callable[[], Any]) -> int:
    """Bytes of CPU memory that are allocated in a forward and still held when it has ended, its output included.

    By the allocator's own count: what is kept outside of autograd counts, too. Run twice, the first time for tables.
    """
    kept = [run()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept.append(run())
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())
