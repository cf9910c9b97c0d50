"""Linear layers N -> M: dense and structured, all with the same outside, so that a model is written against a builder.

Source of the structured maps and their initialisation: arXiv 2406.16450, sections 2 and 4.1; the maths is in `ops/`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.ops import lowrank
from megastruct.parallel.seeds import named_generator

Names = tuple[str | int, ...]
LinearBuilder = Callable[[int, int], nn.Module]  # (in_features, out_features) -> layer


def draw_normal(shape: tuple[int, ...], std: float, names: Names) -> Tensor:
    """N(0, std^2) in float32 from the stream `names`."""
    return torch.randn(shape, generator=named_generator(*names)) * std


class Linear(nn.Module):
    """Dense: y = W x + b, weight [M, N], bias [M]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., M]"""
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        self.weight.copy_(draw_normal(tuple(self.weight.shape), self.init_std, (*names, "weight")))


class LowRankLinear(nn.Module):
    """LowRank(R): y = U (V x) + b, v [R, N], u [M, R], bias [M]."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.v = nn.Parameter(torch.empty(rank, in_features))
        self.u = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., M]"""
        return lowrank.apply(x, self.v, self.u, self.bias)

    def to_dense(self) -> Tensor:
        """The equal dense weight [M, N]."""
        return lowrank.to_dense(self.v, self.u)

    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        shape = (self.u.shape[0], self.v.shape[1])
        v, u = lowrank.init_factors(draw_normal(shape, self.init_std, (*names, "weight")), self.v.shape[0])
        self.v.copy_(v)
        self.u.copy_(u)
