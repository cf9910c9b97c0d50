"""Object collectives that also work in one process without a group, and errors that all ranks share.

An error of one rank is raised on all ranks. Otherwise the others would wait for it until the process group times out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megastruct.errors import Problem, UserError

T = TypeVar("T")
MAX_PROBLEMS = 8


def rank_in(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group (None: the world); 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in the group (None: the world); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size_of(group)
    dist.all_gather_object(values, value, group)
    return values


def from_first_rank(value: T) -> T:
    """Rank 0's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on this rank and return its result. Collective over `group`, if torch.distributed is in use.

    Raises UserError on every rank if `function` raised one on any rank, with the distinct problems of all ranks.
    """
    result, own = None, None
    try:
        result = function()
    except UserError as error:
        own = error
    errors = [error for error in gather(own, group) if error]
    if errors:
        problems: list[Problem] = list(dict.fromkeys(problem for error in errors for problem in error.problems))
        raise UserError(problems[:MAX_PROBLEMS], errors[0].headline, on_all_ranks=True)
    return cast(T, result)
