"""Normalisation over the last dimension.

The weights are replicated over tensor-parallel ranks, and each rank normalises its own tokens, or the heads of its own
attention, so the gradients of weight and bias are summed over the group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.parallel.collectives import sum_gradient
from megastruct.parallel.groups import ALONE, TensorGroup


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, weight and bias [h]; statistics in float32 for bf16 input."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [s/tp, b, h] over h; shape and dtype stay."""
        bias = None if self.bias is None else sum_gradient(self.bias, self.tp)
        return F.layer_norm(x, self.weight.shape, sum_gradient(self.weight, self.tp), bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, weight [h]. Source: Zhang and Sennrich 2019 (arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] over h; shape and dtype stay."""
        return F.rms_norm(x, self.weight.shape, sum_gradient(self.weight, self.tp), self.eps)
