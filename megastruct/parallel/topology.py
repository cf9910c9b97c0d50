"""Which rank is which: the grid of pipeline stages x data-parallel replicas.

The order of ranks is DeepSpeed's (`PipeModelDataParallelTopology`, axes pipe, data, model, the last one fastest),
so neighbours in a stage are neighbours on a node. No process group is made here: a topology is plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from megastruct.errors import Problem, UserError


@dataclass(frozen=True)
class Topology:
    """`pp_size` pipeline stages, each with `dp_size` replicas; rank = stage * dp_size + replica."""

    pp_size: int
    dp_size: int

    @property
    def world_size(self) -> int:
        return self.pp_size * self.dp_size

    def pp_rank(self, rank: int) -> int:
        return rank // self.dp_size

    def dp_rank(self, rank: int) -> int:
        return rank % self.dp_size

    def is_first_stage(self, rank: int) -> bool:
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        return self.pp_rank(rank) == self.pp_size - 1

    @classmethod
    def of_world(cls, world_size: int, pp_size: int, dp_size: int | None) -> Topology:
        """The grid for `world_size` processes; `dp_size` None takes what the pipeline leaves.

        Raises UserError if the sizes do not multiply to the world size.
        """
        if dp_size is None:
            if world_size % pp_size:
                nearest = max(pp_size, world_size // pp_size * pp_size)
                raise UserError(
                    Problem(
                        "parallel.pp",
                        f"{world_size} processes do not divide into pipelines of {pp_size} stages",
                        f"start {nearest} processes, or parallel.pp={_largest_divisor(world_size, pp_size)}",
                    )
                )
            dp_size = world_size // pp_size
        if pp_size * dp_size != world_size:
            raise UserError(
                Problem(
                    "parallel.dp",
                    f"pp {pp_size} x dp {dp_size} needs {pp_size * dp_size} processes, {world_size} were started",
                    f"start {pp_size * dp_size} processes, or leave parallel.dp out to use what there is",
                )
            )
        return cls(pp_size=pp_size, dp_size=dp_size)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(at_most, 0, -1) if number % divisor == 0)
