"""Dense: y = W x, W [M, N]."""

from __future__ import annotations

import torch
from torch import Tensor

from megastruct.structures.product import linear


def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; weight [M, N], bias [M]."""
    return linear(x, weight, bias)


def apply_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same map written out as sums, one output feature after the other."""
    y = torch.stack([(x * row).sum(-1) for row in weight], dim=-1)
    return y if bias is None else y + bias


def to_dense(weight: Tensor) -> Tensor:
    """The weight itself [M, N]."""
    return weight


def project(weight: Tensor) -> tuple[Tensor]:
    """The weight itself [M, N]."""
    return (weight,)
