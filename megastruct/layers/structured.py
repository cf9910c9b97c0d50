"""The structured linear layers N -> M, from outside like the dense one, so that a model is written against a builder.

Source of the maps and their initialisation: arXiv 2406.16450, sections 2 and 4.1; the mathematics is in `ops/`.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from megastruct.layers.linear import Linear, Names, draw_normal
from megastruct.ops import blockdense, blockshuffle, lowrank
from megastruct.ops.orthonormal import nearest_orthonormal
from megastruct.ops.spectral import spectral_scale


class TwoFactorLinear(nn.Module):
    """y = structured(v, u) x + b: two factors v and u, used as `ops` says; bias [M].

    Without `init_std`, each factor (each of its blocks) starts orthonormal times `spectral_scale` of its shape.
    """

    ops: ClassVar[ModuleType]

    def __init__(
        self, v_shape: tuple[int, ...], u_shape: tuple[int, ...], out_features: int, bias: bool, init_std: float | None
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.v = nn.Parameter(torch.empty(v_shape))
        self.u = nn.Parameter(torch.empty(u_shape))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., M]"""
        return self.ops.apply(x, self.v, self.u, self.bias)

    def to_dense(self) -> Tensor:
        """The equal dense weight [M, N]."""
        return self.ops.to_dense(self.v, self.u)

    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        v, u = self.draw_factors(1.0 if self.init_std is None else self.init_std, names)
        if self.init_std is None:
            v, u = (nearest_orthonormal(factor) * spectral_scale(factor) for factor in (v, u))
        self.v.copy_(v)
        self.u.copy_(u)

    def draw_factors(self, std: float, names: Names) -> tuple[Tensor, Tensor]:
        """Initial v and u from draws of N(0, std^2)."""
        return self.ops.init_factors(
            draw_normal(tuple(self.v.shape), std, (*names, "v")),
            draw_normal(tuple(self.u.shape), std, (*names, "u")),
        )


class LowRankLinear(TwoFactorLinear):
    """LowRank(R): y = U (V x) + b, v [R, N], u [M, R]. Starts as the truncated SVD of a dense draw."""

    ops = lowrank

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        super().__init__((rank, in_features), (out_features, rank), out_features, bias, init_std)

    def draw_factors(self, std: float, names: Names) -> tuple[Tensor, Tensor]:
        shape = (self.u.shape[0], self.v.shape[1])
        return lowrank.init_factors(draw_normal(shape, std, (*names, "weight")), self.v.shape[0])


class BlockDenseLinear(TwoFactorLinear):
    """BlockDense(B, R): y = U (V_b x) + b, v [B, R/B, N/B], u [M, R]. Starts with orthonormal blocks and U."""

    ops = blockdense

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        rank: int,
        bias: bool = True,
        init_std: float | None = 0.02,
    ) -> None:
        v_shape = (nblocks, rank // nblocks, in_features // nblocks)
        super().__init__(v_shape, (out_features, rank), out_features, bias, init_std)


class BlockShuffleLinear(TwoFactorLinear):
    """BlockShuffle(B): y = f^-1(U_b f(V_b x)) + b with K = min(N, M), v [B, K/B, N/B], u [B, M/B, K/B].

    Starts with orthonormal blocks.
    """

    ops = blockshuffle

    def __init__(
        self, in_features: int, out_features: int, nblocks: int, bias: bool = True, init_std: float | None = 0.02
    ) -> None:
        n, m = in_features // nblocks, out_features // nblocks
        super().__init__((nblocks, min(n, m), n), (nblocks, m, min(n, m)), out_features, bias, init_std)


# Every structure of ops.cost.STRUCTURES; constructors take (in_features, out_features, its sizes, bias, init_std).
LINEARS: dict[str, type[nn.Module]] = {
    "dense": Linear,
    "lowrank": LowRankLinear,
    "blockdense": BlockDenseLinear,
    "blockshuffle": BlockShuffleLinear,
}
