"""y = A X B^T, with X the input as a matrix of rows of k features."""

from __future__ import annotations

import torch
from torch import Tensor


def small_product(x: Tensor, b: Tensor) -> Tensor:
    """X B^T: x [..., i k] -> [..., i k], b [k, k]"""
    return (x.unflatten(-1, (-1, b.shape[1])) @ b.mT).flatten(-2)


def large_product(x: Tensor, a: Tensor, order: int) -> Tensor:
    """A X: x [..., i k] -> [..., o k], a [o, i]"""
    return (a @ x.unflatten(-1, (-1, order))).flatten(-2)


def apply(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; a [M/k, N/k], b [k, k], bias [M]."""
    if a.shape[0] >= a.shape[1]:
        y = large_product(small_product(x, b), a, b.shape[0])
    else:
        y = small_product(large_product(x, a, b.shape[0]), b)
    return y if bias is None else y + bias


def apply_reference(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same map through its dense weight, entry by entry."""
    k = b.shape[0]
    rows = [[a[o // k, i // k] * b[o % k, i % k] for i in range(a.shape[1] * k)] for o in range(a.shape[0] * k)]
    y = torch.stack([(x * torch.stack(row)).sum(-1) for row in rows], dim=-1)
    return y if bias is None else y + bias


def to_dense(a: Tensor, b: Tensor) -> Tensor:
    """The equal dense weight [M, N]."""
    return torch.kron(a, b)
