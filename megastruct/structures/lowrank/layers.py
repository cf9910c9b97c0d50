"""LowRank(R), y = U (V x) + b: on one process, and over tensor-parallel ranks, which send R values per token.

Letters: s sequence, b micro-batch, N inputs, M outputs, R rank of the matrix, tp ranks.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.dense.maths import apply as product
from megastruct.structures.layers import Layers
from megastruct.structures.linear import StructuredLinear
from megastruct.structures.lowrank import maths
from megastruct.structures.lowrank.numbers import LowRankNumbers
from megastruct.structures.product import partial_sums
from megastruct.structures.sharded import ShardedLinear


class LowRankLinear(StructuredLinear):
    """y = U (V x) + b: v [R, N], u [M, R], bias [M]. Starts as a truncated SVD of a dense draw would be distributed."""

    numbers = LowRankNumbers()
    maths: ClassVar[ModuleType] = maths

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        super().__init__(in_features, out_features, bias, init_std, rank=rank)


class LowRankColumnLinear(ShardedLinear):
    """fc1: v [R, N] replicated, applied to own tokens; u [M/tp, R] and bias [M/tp] the rank's rows."""

    linear, form = LowRankLinear, "column"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"u": ShardSpec.along(0, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, N] to [s, b, M/tp]."""
        z = product(x, self.replicated(self.v))  # [s/tp, b, R]
        return product(gather_sequence(z, self.tp), self.u, self.bias)  # [s, b, R] -> [s, b, M/tp]


class LowRankRowLinear(ShardedLinear):
    """fc2: v [R, N/tp] the rank's columns; u [M, R] and bias [M] replicated, applied to own tokens."""

    linear, form = LowRankLinear, "row"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"v": ShardSpec.along(1, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s, b, N/tp] to [s/tp, b, M]."""
        with partial_sums(True):
            z = product(x, self.v)
        z = reduce_scatter_sequence(z, self.tp)  # [s, b, R] partial -> [s/tp, b, R]
        return product(z, self.replicated(self.u), self.replicated_bias())


LAYERS = Layers(maths, LowRankLinear, LowRankColumnLinear, LowRankRowLinear)
