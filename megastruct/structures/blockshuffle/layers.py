"""BlockShuffle(B), y = f^-1(U_b f(V_b x)) + b, on one process and over tensor-parallel ranks.

fc1 communicates K values per token, fc2 K / min(tp, B).

Letters: s sequence, b micro-batch, T = s*b tokens, N inputs, M outputs, K = min(N, M) hidden features, B blocks, tp
ranks. Hidden vectors and outputs are feature-major, where the shuffles are strides: see `maths.py`.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.collectives import gather_tokens
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.block_product import block_product
from megastruct.structures.block_sharding import hidden_features, row_hidden_features, row_spec
from megastruct.structures.blockshuffle import maths
from megastruct.structures.blockshuffle.numbers import BlockShuffleNumbers
from megastruct.structures.layers import Layers
from megastruct.structures.linear import StructuredLinear
from megastruct.structures.sharded import ShardedLinear


class BlockShuffleLinear(StructuredLinear):
    """y = f^-1(U_b f(V_b x)) + b with K = min(N, M): v [B, K/B, N/B], u [B, M/B, K/B], bias [M].

    Starts with orthonormal blocks.
    """

    numbers = BlockShuffleNumbers()
    maths: ClassVar[ModuleType] = maths

    def __init__(
        self, in_features: int, out_features: int, nblocks: int, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        super().__init__(in_features, out_features, bias, init_std, nblocks=nblocks)


class BlockShuffleColumnLinear(ShardedLinear):
    """fc1: v [B, K/B, N/B] replicated, applied to own tokens; u [B, M/B/tp, K/B] the rank's rows of every block.

    f^-1 writes position p of block l to output p*B + l: a slice of the positions of all blocks is a slice of the
    outputs. bias [M/tp].
    """

    linear, form = BlockShuffleLinear, "column"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"u": ShardSpec.along(1, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, N] to [s, b, M/tp]."""
        hidden = hidden_features(x, self.replicated(self.v), feature_major=True)  # [T/tp, K]
        hidden = gather_tokens(hidden.t(), self.tp).t()  # [T, K]
        return _second_factor(hidden, self.u, self.bias, x.shape[1])


class BlockShuffleRowLinear(ShardedLinear):
    """fc2: v [B/tp, K/B, N/B] is the rank's blocks; u [B, M/B, K/B] and bias [M] are replicated, applied to own tokens.

    If tp > B, v [1, K/B, N/tp] is the rank's inputs of one block.
    """

    linear, form = BlockShuffleLinear, "row"
    v: nn.Parameter
    u: nn.Parameter

    @override
    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"v": row_spec(self.sizes["nblocks"], tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s, b, N/tp] to [s/tp, b, M]."""
        hidden = row_hidden_features(x, self.v, self.sizes["nblocks"], self.tp, feature_major=True)  # [T/tp, K]
        return _second_factor(hidden, self.replicated(self.u), self.replicated_bias(), x.shape[1])


def _second_factor(hidden: Tensor, u: Tensor, bias: Tensor | None, batch: int) -> Tensor:
    """f^-1(U_b f(hidden)) + bias: hidden [T, K], feature-major, u [B, M/B, K/B] -> [T/b, b, M]"""
    y = block_product(hidden, u.to(hidden.dtype), shuffled=True, feature_major=True).unflatten(0, (-1, batch))
    return y if bias is None else y + bias.to(y.dtype)


LAYERS = Layers(maths, BlockShuffleLinear, BlockShuffleColumnLinear, BlockShuffleRowLinear)
