"""The norms of `layers/` between sharded layers: the weights are replicated, each rank normalises its own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.layers.norm import LayerNorm, RMSNorm
from megastruct.parallel.collectives import sum_gradient
from megastruct.parallel.groups import TensorGroup


class SequenceParallelLayerNorm(LayerNorm):
    """LayerNorm of own tokens; the gradients of weight [h] and bias [h] are summed over the group."""

    def __init__(self, hidden_size: int, tp: TensorGroup, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(hidden_size, eps, bias)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, h] -> [s/tp, b, h]"""
        bias = None if self.bias is None else sum_gradient(self.bias, self.tp)
        return F.layer_norm(x, self.weight.shape, sum_gradient(self.weight, self.tp), bias, self.eps)


class SequenceParallelRMSNorm(RMSNorm):
    """RMSNorm of own tokens; the gradient of weight [h] is summed over the group."""

    def __init__(self, hidden_size: int, tp: TensorGroup, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """x [s/tp, b, h] -> [s/tp, b, h]"""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * sum_gradient(self.weight, self.tp)
