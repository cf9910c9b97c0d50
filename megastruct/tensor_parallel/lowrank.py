"""LowRank(R), y = U (V x) + b, over tensor-parallel ranks: R values per token are communicated, not d.

Letters: s sequence, b micro-batch, N inputs, M outputs, R rank of the matrix, tp ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.structured import LowRankLinear
from megastruct.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec
from megastruct.tensor_parallel.base import ShardedLayer


class _LowRank(ShardedLayer):
    v: nn.Parameter
    u: nn.Parameter

    def __init__(self, sizes: tuple[int, int, int], tp: TensorGroup, init_std: float | None) -> None:
        super().__init__(tp)
        self.sizes, self.init_std = sizes, init_std
        self.register_parameter("bias", None)

    def unsharded(self) -> LowRankLinear:
        return LowRankLinear(*self.sizes, bias=self.bias is not None, init_std=self.init_std)


class LowRankColumnLinear(_LowRank):
    """fc1: v [R, N] replicated, applied to own tokens; u [M/tp, R] and bias [M/tp] the rank's rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, rank), tp, init_std)
        columns = ShardSpec.along(0, tp.size)
        self.add_parameter("v", (rank, in_features))
        self.add_parameter("u", (out_features, rank), columns)
        if bias:
            self.add_parameter("bias", (out_features,), columns)

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, N] -> [s, b, M/tp]"""
        z = F.linear(x, self.replicated(self.v))  # [s/tp, b, R]
        return F.linear(gather_sequence(z, self.tp), self.u, self.bias)  # [s, b, R] -> [s, b, M/tp]


class LowRankRowLinear(_LowRank):
    """fc2: v [R, N/tp] the rank's columns; u [M, R] and bias [M] replicated, applied to own tokens."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, rank), tp, init_std)
        self.add_parameter("v", (rank, in_features), ShardSpec.along(1, tp.size))
        self.add_parameter("u", (out_features, rank))
        if bias:
            self.add_parameter("bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, N/tp] -> [s/tp, b, M]"""
        z = reduce_scatter_sequence(F.linear(x, self.v), self.tp)  # [s, b, R] partial -> [s/tp, b, R]
        return F.linear(z, self.replicated(self.u), self.replicated_bias())
