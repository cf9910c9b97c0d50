"""BlockDense(B, R), y = U (V_b x) + b, over tensor-parallel ranks: R or R/tp values per token are communicated.

Letters: s sequence, b micro-batch, T = s*b tokens, N inputs, M outputs, R hidden features, B blocks, tp ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.structured import BlockDenseLinear
from megastruct.ops import blockdense
from megastruct.parallel.collectives import gather_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec
from megastruct.tensor_parallel.base import ShardedLayer
from megastruct.tensor_parallel.blocks import hidden_features, row_hidden_features, row_spec


class _BlockDense(ShardedLayer):
    v: nn.Parameter
    u: nn.Parameter

    def __init__(self, sizes: tuple[int, int, int, int], tp: TensorGroup, init_std: float | None) -> None:
        super().__init__(tp)
        n, _, nblocks, rank = sizes
        if n % nblocks or rank % nblocks:
            raise ValueError(f"{nblocks} blocks do not divide {n} inputs and rank {rank}")
        self.sizes, self.nblocks, self.init_std = sizes, nblocks, init_std
        self.register_parameter("bias", None)

    def unsharded(self) -> BlockDenseLinear:
        n, m, nblocks, rank = self.sizes
        bias = self.bias is not None
        return BlockDenseLinear(n, m, nblocks=nblocks, rank=rank, bias=bias, init_std=self.init_std)


class BlockDenseColumnLinear(_BlockDense):
    """fc1: v [B, R/B, N/B] replicated, applied to own tokens; u [M/tp, R] and bias [M/tp] the rank's rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        rank: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, nblocks, rank), tp, init_std)
        columns = ShardSpec.along(0, tp.size)
        self.add_parameter("v", (nblocks, rank // nblocks, in_features // nblocks))
        self.add_parameter("u", (out_features, rank), columns)
        if bias:
            self.add_parameter("bias", (out_features,), columns)

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, N] -> [s, b, M/tp]"""
        if self.tp.size == 1:  # as one operator, which the compiler keeps in the layout of its neighbours
            return blockdense.apply(x, self.v, self.u, self.bias)
        hidden = hidden_features(x, self.replicated(self.v), feature_major=False).unflatten(0, (-1, x.shape[1]))
        return F.linear(gather_sequence(hidden, self.tp), self.u, self.bias)  # [s/tp, b, R] -> [s, b, M/tp]


class BlockDenseRowLinear(_BlockDense):
    """fc2: the rank's blocks of v [B/tp, R/B, N/B] (tp > B: its inputs of one block, [1, R/B, N/tp]); u [M, R] and
    bias [M] replicated, applied to own tokens."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        rank: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, nblocks, rank), tp, init_std)
        self.add_parameter("v", (nblocks, rank // nblocks, in_features // nblocks), row_spec(nblocks, tp.size))
        self.add_parameter("u", (out_features, rank))
        if bias:
            self.add_parameter("bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, N/tp] -> [s/tp, b, M]"""
        if self.tp.size == 1:  # as one operator, which the compiler keeps in the layout of its neighbours
            return blockdense.apply(x, self.v, self.u, self.bias)
        hidden = row_hidden_features(x, self.v, self.nblocks, self.tp, feature_major=False)  # [T/tp, R]
        y = F.linear(hidden, self.replicated(self.u), self.replicated_bias())  # [T/tp, M]
        return y.unflatten(0, (-1, x.shape[1]))
