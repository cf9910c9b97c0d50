"""The place of each rank in the grid of pipeline stages x data-parallel replicas x tensor-parallel ranks.

The order of ranks is DeepSpeed's (`PipeModelDataParallelTopology`, axes pipe, data, model, the last one fastest). So
the ranks of a tensor-parallel group, which communicate most, are neighbours on a node. A topology is plain arithmetic;
process groups are made from it where they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megastruct.errors import Problem, UserError


@dataclass(frozen=True)
class Topology:
    """The sizes of the grid: rank = (stage * dp_size + replica) * tp_size + tensor rank."""

    pp_size: int
    dp_size: int
    tp_size: int = 1

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.pp_size * self.dp_size * self.tp_size

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of `rank`."""
        return rank // (self.dp_size * self.tp_size)

    def dp_rank(self, rank: int) -> int:
        """The data-parallel replica of `rank`."""
        return rank // self.tp_size % self.dp_size

    def tp_rank(self, rank: int) -> int:
        """The position of `rank` in its tensor-parallel group."""
        return rank % self.tp_size

    def is_first_stage(self, rank: int) -> bool:
        """Whether `rank` is on the first stage, which reads the ids."""
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether `rank` is on the last stage, which computes the loss."""
        return self.pp_rank(rank) == self.pp_size - 1

    def tp_groups(self) -> list[list[int]]:
        """The ranks of every tensor-parallel group."""
        return [list(range(first, first + self.tp_size)) for first in range(0, self.world_size, self.tp_size)]

    @classmethod
    def of_world(cls, world_size: int, pp_size: int, dp_size: int | None, tp_size: int = 1) -> Topology:
        """The grid for `world_size` processes; `dp_size` None uses all processes for replicas.

        Raises UserError if the sizes do not multiply to the world size.
        """
        share = pp_size * tp_size
        model = f"pp {pp_size} x tp {tp_size}" if tp_size > 1 else f"pipelines of {pp_size} stages"
        if dp_size is None:
            if world_size % share:
                nearest = max(share, world_size // share * share)
                where = "parallel.pp" if tp_size == 1 else "parallel.pp, parallel.tp"
                found = f"{world_size} processes do not divide into {model}"
                suggestion = f"start {nearest} processes"
                if tp_size == 1:
                    suggestion += f", or parallel.pp={_largest_divisor(world_size, pp_size)}"
                raise UserError(Problem(where, found, suggestion))
            dp_size = world_size // share
        if share * dp_size != world_size:
            sizes = f"pp {pp_size} x dp {dp_size}" + (f" x tp {tp_size}" if tp_size > 1 else "")
            raise UserError(
                Problem(
                    "parallel.dp",
                    f"{sizes} needs {share * dp_size} processes, {world_size} were started",
                    f"start {share * dp_size} processes, or leave parallel.dp out to use all processes",
                )
            )
        return cls(pp_size=pp_size, dp_size=dp_size, tp_size=tp_size)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(at_most, 0, -1) if number % divisor == 0)
