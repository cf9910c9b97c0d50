"""BlockDense(B, R), y = U (V_b x) + b, on one process and over tensor-parallel ranks.

fc1 communicates R values per token, fc2 R / min(tp, B).

Letters: s sequence, b micro-batch, T = s*b tokens, N inputs, M outputs, R hidden features, B blocks, tp ranks.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.collectives import gather_sequence
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.block_sharding import hidden_features, row_hidden_features, row_spec
from megastruct.structures.blockdense import maths
from megastruct.structures.blockdense.numbers import BlockDenseNumbers
from megastruct.structures.dense.maths import apply as product
from megastruct.structures.layers import Layers
from megastruct.structures.linear import StructuredLinear
from megastruct.structures.sharded import ShardedLinear


class BlockDenseLinear(StructuredLinear):
    """y = U (V_b x) + b: v [B, R/B, N/B], u [M, R], bias [M]. Starts with orthonormal blocks and U."""

    numbers = BlockDenseNumbers()
    maths: ClassVar[ModuleType] = maths

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        rank: int,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__(in_features, out_features, bias, init_std, nblocks=nblocks, rank=rank)


class BlockDenseColumnLinear(ShardedLinear):
    """fc1: v [B, R/B, N/B] replicated, applied to own tokens; u [M/tp, R] and bias [M/tp] the rank's rows."""

    linear, form = BlockDenseLinear, "column"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"u": ShardSpec.along(0, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, N] to [s, b, M/tp]."""
        hidden = hidden_features(x, self.replicated(self.v), feature_major=False).unflatten(0, (-1, x.shape[1]))
        return product(gather_sequence(hidden, self.tp), self.u, self.bias)  # [s/tp, b, R] -> [s, b, M/tp]


class BlockDenseRowLinear(ShardedLinear):
    """fc2: v [B/tp, R/B, N/B] is the rank's blocks; u [M, R] and bias [M] are replicated, applied to own tokens.

    If tp > B, v [1, R/B, N/tp] is the rank's inputs of one block.
    """

    linear, form = BlockDenseLinear, "row"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"v": row_spec(self.sizes["nblocks"], tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s, b, N/tp] to [s/tp, b, M]."""
        hidden = row_hidden_features(x, self.v, self.sizes["nblocks"], self.tp, feature_major=False)  # [T/tp, R]
        y = product(hidden, self.replicated(self.u), self.replicated_bias())  # [T/tp, M]
        return y.unflatten(0, (-1, x.shape[1]))


LAYERS = Layers(maths, BlockDenseLinear, BlockDenseColumnLinear, BlockDenseRowLinear)
