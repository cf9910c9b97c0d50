"""A tensor-parallel group as layers see it: who takes part, and which of them this process is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorGroup:
    """`size` ranks that share every block's weights; `group` is None for a process on its own (size 1)."""

    group: ProcessGroup | None = None
    size: int = 1
    rank: int = 0
