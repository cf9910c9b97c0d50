"""BlockDense(B, R), y = U (V_b x) + b: on one process, and over tensor-parallel ranks, where R or R/tp values per token
are communicated.

Letters: s sequence, b micro-batch, T = s*b tokens, N inputs, M outputs, R hidden features, B blocks, tp ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megastruct.parallel.collectives import gather_sequence
from megastruct.parallel.seeds import Names, draw_normal
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

    numbers, maths = BlockDenseNumbers(), maths

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

    def draw_factors(self, std: float, names: Names) -> dict[str, Tensor]:
        drawn = (draw_normal(tuple(getattr(self, name).shape), std, (*names, name)) for name in ("v", "u"))
        v, u = maths.init_factors(*drawn)
        return {"v": v, "u": u}


class BlockDenseColumnLinear(ShardedLinear):
    """fc1: v [B, R/B, N/B] replicated, applied to own tokens; u [M/tp, R] and bias [M/tp] the rank's rows."""

    linear, form = BlockDenseLinear, "column"
    v: nn.Parameter
    u: nn.Parameter

    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"u": ShardSpec.along(0, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """x [s/tp, b, N] -> [s, b, M/tp]"""
        hidden = hidden_features(x, self.replicated(self.v), feature_major=False).unflatten(0, (-1, x.shape[1]))
        return product(gather_sequence(hidden, self.tp), self.u, self.bias)  # [s/tp, b, R] -> [s, b, M/tp]


class BlockDenseRowLinear(ShardedLinear):
    """fc2: the rank's blocks of v [B/tp, R/B, N/B] (tp > B: its inputs of one block, [1, R/B, N/tp]); u [M, R] and
    bias [M] replicated, applied to own tokens."""

    linear, form = BlockDenseLinear, "row"
    v: nn.Parameter
    u: nn.Parameter

    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"v": row_spec(self.sizes["nblocks"], tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """x [s, b, N/tp] -> [s/tp, b, M]"""
        hidden = row_hidden_features(x, self.v, self.sizes["nblocks"], self.tp, feature_major=False)  # [T/tp, R]
        y = product(hidden, self.replicated(self.u), self.replicated_bias())  # [T/tp, M]
        return y.unflatten(0, (-1, x.shape[1]))


LAYERS = Layers(maths, BlockDenseLinear, BlockDenseColumnLinear, BlockDenseRowLinear)
