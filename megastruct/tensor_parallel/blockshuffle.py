"""BlockShuffle(B), y = f^-1(U_b f(V_b x)) + b, over tensor-parallel ranks: K into fc1, K/tp out of fc2 per token.

Letters: s sequence, b micro-batch, T = s*b tokens, N inputs, M outputs, K = min(N, M) hidden features, B blocks, tp
ranks. Hidden vectors and outputs are feature-major, where the shuffles are strides: see `ops/blockshuffle.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from megastruct.layers.structured import BlockShuffleLinear
from megastruct.ops import blockshuffle
from megastruct.ops.blocks import block_product
from megastruct.parallel.collectives import gather_tokens
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec
from megastruct.tensor_parallel.base import ShardedLayer
from megastruct.tensor_parallel.blocks import hidden_features, row_hidden_features, row_spec


class _BlockShuffle(ShardedLayer):
    v: nn.Parameter
    u: nn.Parameter

    def __init__(self, sizes: tuple[int, int, int], tp: TensorGroup, init_std: float | None) -> None:
        super().__init__(tp)
        n, m, nblocks = sizes
        if n % nblocks or m % nblocks:
            raise ValueError(f"{nblocks} blocks do not divide {n} inputs and {m} outputs")
        self.sizes, self.nblocks, self.init_std = sizes, nblocks, init_std
        k_per_block = min(n, m) // nblocks
        self.v_shape = (nblocks, k_per_block, n // nblocks)
        self.u_shape = (nblocks, m // nblocks, k_per_block)
        self.register_parameter("bias", None)

    def unsharded(self) -> BlockShuffleLinear:
        n, m, nblocks = self.sizes
        return BlockShuffleLinear(n, m, nblocks=nblocks, bias=self.bias is not None, init_std=self.init_std)


class BlockShuffleColumnLinear(_BlockShuffle):
    """fc1: v [B, K/B, N/B] replicated, applied to own tokens; u [B, M/B/tp, K/B] the rank's rows of every block.

    f^-1 writes position p of block l to output p*B + l: a slice of the positions of all blocks is a slice of the
    outputs. bias [M/tp].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, nblocks), tp, init_std)
        self.add_parameter("v", self.v_shape)
        self.add_parameter("u", self.u_shape, ShardSpec.along(1, tp.size))
        if bias:
            self.add_parameter("bias", (out_features,), ShardSpec.along(0, tp.size))

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, N] -> [s, b, M/tp]"""
        if self.tp.size == 1:  # as one operator, which the compiler keeps in the layout of its neighbours
            return blockshuffle.apply(x, self.v, self.u, self.bias)
        hidden = hidden_features(x, self.replicated(self.v), feature_major=True)  # [T/tp, K]
        hidden = gather_tokens(hidden.t(), self.tp).t()  # [T, K]
        return _second_factor(hidden, self.u, self.bias, x.shape[1])


class BlockShuffleRowLinear(_BlockShuffle):
    """fc2: the rank's blocks of v [B/tp, K/B, N/B] (tp > B: its inputs of one block, [1, K/B, N/tp]); u [B, M/B, K/B]
    and bias [M] replicated, applied to own tokens."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__((in_features, out_features, nblocks), tp, init_std)
        self.add_parameter("v", self.v_shape, row_spec(nblocks, tp.size))
        self.add_parameter("u", self.u_shape)
        if bias:
            self.add_parameter("bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, N/tp] -> [s/tp, b, M]"""
        if self.tp.size == 1:  # as one operator, which the compiler keeps in the layout of its neighbours
            return blockshuffle.apply(x, self.v, self.u, self.bias)
        hidden = row_hidden_features(x, self.v, self.nblocks, self.tp, feature_major=True)  # [T/tp, K]
        return _second_factor(hidden, self.replicated(self.u), self.replicated_bias(), x.shape[1])


def _second_factor(hidden: Tensor, u: Tensor, bias: Tensor | None, batch: int) -> Tensor:
    """f^-1(U_b f(hidden)) + bias: hidden [T, K], feature-major, u [B, M/B, K/B] -> [T/b, b, M]"""
    y = block_product(hidden, u.to(hidden.dtype), shuffled=True, feature_major=True).unflatten(0, (-1, batch))
    return y if bias is None else y + bias.to(y.dtype)
