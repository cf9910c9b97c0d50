"""The dense linear layers: the one of one process, and Megatron's pair of a column-sharded and a row-sharded one.

Letters: s sequence, b micro-batch, N inputs, M outputs, tp ranks. The pair communicates d values per token, where d is
the outer width. Source: Shoeybi et al. 2019 (arXiv 1909.08053), Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from megastruct.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.seeds import Names, draw_normal
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.dense import maths
from megastruct.structures.dense.numbers import DenseNumbers
from megastruct.structures.layers import Layers
from megastruct.structures.linear import StructuredLinear
from megastruct.structures.product import partial_sums
from megastruct.structures.sharded import ShardedLinear
from megastruct.structures.spectral import spectral_std


class Linear(StructuredLinear):
    """y = W x + b, weight [M, N], bias [M]. If `init_std` is None, W starts with the `spectral_std` of its shape."""

    numbers = DenseNumbers()
    maths: ClassVar[ModuleType] = maths
    weight: torch.nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_std: float | None = 0.02) -> None:
        super().__init__(in_features, out_features, bias, init_std)

    @override
    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        std = spectral_std(self.weight) if self.init_std is None else self.init_std
        self.weight.copy_(draw_normal(tuple(self.weight.shape), std, (*names, "weight")))


class ColumnParallelLinear(ShardedLinear):
    """The column form: weight [M/tp, N] and bias [M/tp] are the rank's rows.

    `gather_input` is False where the caller gathers the input once for several layers (query, key, value).
    """

    linear, form = Linear, "column"
    weight: torch.nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
        gather_input: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, tp, bias, init_std)
        self.gather_input = gather_input

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"weight": ShardSpec.along(0, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, N], or [s, b, N] without `gather_input`, to [s, b, M/tp]."""
        if self.gather_input:
            x = gather_sequence(x, self.tp)  # [s, b, N]
        return maths.apply(x, self.weight, self.bias)


class RowParallelLinear(ShardedLinear):
    """The row form: weight [M, N/tp] is the rank's columns; bias [M] is replicated, added to own tokens."""

    linear, form = Linear, "row"
    weight: torch.nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"weight": ShardSpec.along(1, tp_size)}

    def forward(self, x: Tensor) -> Tensor:
        """Map x [s, b, N/tp] to [s/tp, b, M].

        The bias is added last on one rank too, so that all group sizes round alike.
        """
        with partial_sums(self.tp.size > 1):
            y = maths.apply(x, self.weight)
        y = reduce_scatter_sequence(y, self.tp)  # [s, b, M] partial -> [s/tp, b, M]
        bias = self.replicated_bias()
        return y if bias is None else y + bias


class ReplicatedLinear(ShardedLinear):
    """Weight [M, N] and bias [M] are whole on every rank.

    It is for outputs of which each rank uses a share, such as key/value heads if there are fewer of them than ranks,
    and for the rank's own tokens. The gradients are partial and are summed over the group.
    """

    linear, form = Linear, "row"
    weight: torch.nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        return maths.apply(x, self.replicated(self.weight), self.replicated_bias())


LAYERS = Layers(maths, Linear, ColumnParallelLinear, RowParallelLinear)
