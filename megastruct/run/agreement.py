"""What all ranks of a run must agree on: the data that they see, and the position in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megastruct.checkpoint.agreement import gather
from megastruct.errors import Problem, UserError


def check_same_data(data: dict[str, Any]) -> None:
    """Compare the description of the data over all ranks. Collective. Raises UserError on all ranks if one differs."""
    first, *others = gather(data)
    for rank, other in enumerate(others, 1):
        for key in first:
            if other.get(key) != first[key]:
                found = f"{key} is {other.get(key)!r} on rank {rank} but {first[key]!r} on rank 0"
                suggestion = "the same files on all nodes; for a dataset of the hub, ORG/NAME@COMMIT"
                raise UserError(Problem("data.path", found, suggestion), on_all_ranks=True)


def gather_cursor(cursor: np.ndarray | None, shape: tuple[int, ...], device: torch.device) -> np.ndarray:
    """The cursor of the whole run from those of all replicas (None on ranks that read no data). Collective."""
    local = np.full(shape, -1, dtype=np.int64) if cursor is None else cursor
    tensor = torch.from_numpy(local).to(device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()


def gather_numbers(own: Sequence[float], device: torch.device) -> list[list[float]]:
    """The numbers of every rank, in float64, by rank; all ranks pass as many. Collective."""
    every = torch.empty(dist.get_world_size() * len(own), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(every, torch.tensor(own, dtype=torch.float64, device=device))
    return every.view(-1, len(own)).tolist()
