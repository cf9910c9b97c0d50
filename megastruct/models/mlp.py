"""The feed-forward network, written against a builder of linears: the seam where structured matrices come in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.linear import LinearBuilder


class MLP(nn.Module):
    """fc2(gelu(fc1 x)) or, gated, fc2(silu(gate) * value) with (gate, value) = fc1 x in one map h -> 2f."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, gated: bool, linear: LinearBuilder) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = linear(hidden_size, ffn_hidden_size * (2 if gated else 1))
        self.fc2 = linear(ffn_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> [s, b, h]"""
        y = self.fc1(x)  # [s, b, f] or [s, b, 2f]
        if self.gated:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        else:
            y = F.gelu(y, approximate="tanh")
        return self.fc2(y)
