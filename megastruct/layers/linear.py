"""The dense linear layer, and what every linear layer N -> M shares; the structured ones are in `structured.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.ops.spectral import spectral_std
from megastruct.parallel.seeds import named_generator

Names = tuple[str | int, ...]
LinearBuilder = Callable[[int, int], nn.Module]  # (in_features, out_features) -> layer


def draw_normal(shape: tuple[int, ...], std: float, names: Names) -> Tensor:
    """N(0, std^2) in float32 from the stream `names`."""
    return torch.randn(shape, generator=named_generator(*names)) * std


class Linear(nn.Module):
    """Dense: y = W x + b, weight [M, N], bias [M]. Without `init_std`, W starts at `spectral_std` of its shape."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_std: float | None = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> [..., M]"""
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        std = spectral_std(self.weight) if self.init_std is None else self.init_std
        self.weight.copy_(draw_normal(tuple(self.weight.shape), std, (*names, "weight")))
