"""LowRank(R): y = U (V x), V [R, N], U [M, R]. Source: arXiv 2406.16450, section 2."""

from __future__ import annotations

import torch
from torch import Tensor

from megastruct.structures.draws import singular_values_of_a_draw
from megastruct.structures.orthonormal import orthonormalized
from megastruct.structures.product import linear
from megastruct.structures.truncation import truncated_svd


def apply(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; v [R, N], u [M, R], bias [M]."""
    return linear(linear(x, v), u, bias)


def apply_reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same map written out as sums, one output feature after the other."""
    outputs = []
    for m in range(u.shape[0]):
        y = torch.stack([u[m, r] * (x * v[r]).sum(-1) for r in range(v.shape[0])]).sum(0)
        outputs.append(y if bias is None else y + bias[m])
    return torch.stack(outputs, dim=-1)


def to_dense(v: Tensor, u: Tensor) -> Tensor:
    """The equal dense weight [M, N]."""
    return u @ v


def init_factors(v: Tensor, u: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Draws from a normal distribution -> factors as of the truncated SVD of a dense draw [M, N] from N(0, std^2).

    The singular directions of such a draw are uniformly distributed and independent, so they need no SVD: they are the
    orthonormal factors of v [R, N] and u [M, R]. The singular values S are those around which the ones of draws
    scatter. V = sqrt(S) V^T, U = U sqrt(S).
    Source: arXiv 2406.16450, section 4.1 (initialisation).
    """
    singular_values = torch.from_numpy(singular_values_of_a_draw(u.shape[0], v.shape[1], len(v))).to(v.dtype)
    scale = (std * singular_values).sqrt()
    return orthonormalized(v) * scale[:, None], orthonormalized(u) * scale


def project(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (v [R, N], u [M, R]) nearest to a dense weight [M, N] in the Frobenius norm: its truncated SVD."""
    return truncated_svd(weight, rank)
