"""Dense linears in Megatron's pair: a column-sharded one into the sharded features, a row-sharded one out of them.

Letters: s sequence, b micro-batch, N inputs, M outputs, tp ranks. d values per token are communicated, d the width
outside. Source: Shoeybi et al. 2019 (arXiv 1909.08053), Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.linear import Linear
from megastruct.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec
from megastruct.tensor_parallel.base import ShardedLayer


class ColumnParallelLinear(ShardedLayer):
    """weight [M/tp, N] and bias [M/tp], the rank's rows. `gather_input` False: the caller has gathered, once for
    several layers (query, key, value)."""

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
        gather_input: bool = True,
    ) -> None:
        super().__init__(tp)
        self.sizes, self.init_std, self.gather_input = (in_features, out_features), init_std, gather_input
        columns = ShardSpec.along(0, tp.size)
        self.add_parameter("weight", (out_features, in_features), columns)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (out_features,), columns)

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, N], or [s, b, N] without `gather_input` -> [s, b, M/tp]"""
        if self.gather_input:
            x = gather_sequence(x, self.tp)  # [s, b, N]
        return F.linear(x, self.weight, self.bias)

    def unsharded(self) -> Linear:
        return Linear(*self.sizes, bias=self.bias is not None, init_std=self.init_std)


class RowParallelLinear(ShardedLayer):
    """weight [M, N/tp], the rank's columns; bias [M] replicated and added to the rank's own tokens."""

    weight: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, tp: TensorGroup, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        super().__init__(tp)
        self.sizes, self.init_std = (in_features, out_features), init_std
        self.add_parameter("weight", (out_features, in_features), ShardSpec.along(1, tp.size))
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, N/tp] -> [s/tp, b, M]"""
        y = reduce_scatter_sequence(F.linear(x, self.weight), self.tp)  # [s, b, M] partial -> [s/tp, b, M]
        bias = self.replicated_bias()
        return y if bias is None else y + bias

    def unsharded(self) -> Linear:
        return Linear(*self.sizes, bias=self.bias is not None, init_std=self.init_std)


class ReplicatedLinear(ShardedLayer):
    """weight [M, N] and bias [M] on every rank, for an output of which each rank uses a share (key/value heads fewer
    than ranks) or for own tokens: the gradients are partial, and summed over the group."""

    weight: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, tp: TensorGroup, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        super().__init__(tp)
        self.sizes, self.init_std = (in_features, out_features), init_std
        self.add_parameter("weight", (out_features, in_features))
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., M]"""
        return F.linear(x, self.replicated(self.weight), self.replicated_bias())

    def unsharded(self) -> Linear:
        return Linear(*self.sizes, bias=self.bias is not None, init_std=self.init_std)
