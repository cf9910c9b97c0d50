"""The feed-forward network, written against a builder of linears: the seam where structured matrices come in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.linear import LinearBuilder


class MLP(nn.Module):
    """fc2(gelu(fc1 x)) or, gated, fc2(silu(gate) * value) with gate and value in one map h -> 2f.

    Feature 2i of the gated map is gate i, feature 2i + 1 value i: every even slice of its outputs holds whole pairs.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, gated: bool, fc1: LinearBuilder, fc2: LinearBuilder
    ) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = fc1(hidden_size, ffn_hidden_size * (2 if gated else 1))
        self.fc2 = fc2(ffn_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, h] -> [s/tp, b, h]"""
        y = self.fc1(x)  # [s, b, f/tp] or [s, b, 2f/tp]
        if self.gated:
            gate, value = y.unflatten(-1, (-1, 2)).unbind(-1)
            y = F.silu(gate) * value  # [s, b, f/tp]
        else:
            y = F.gelu(y, approximate="tanh")
        return self.fc2(y)
