"""LowRank(R): y = U (V x), V [R, N], U [M, R]. Source: arXiv 2406.16450, section 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.structures.truncation import truncated_svd


def apply(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; v [R, N], u [M, R], bias [M]."""
    return F.linear(F.linear(x, v), u, bias)


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


def init_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of a dense draw [M, N] -> (v [R, N], u [M, R]) with V = sqrt(S) V^T, U = U sqrt(S).

    Source: arXiv 2406.16450, section 4.1 (initialisation). Computed from the eigenvectors of the smaller Gram matrix
    in float64, which is exact enough (the singular values of a random draw are bounded away from zero) and many times
    faster than a full SVD: an 8192 x 2048 draw takes one 2048 x 2048 eigenproblem. Returns the dtype of `weight`.
    """
    w = weight.double()
    if w.shape[0] < w.shape[1]:
        u_t, v_t = init_factors(w.T, rank)
        return v_t.T.contiguous().to(weight.dtype), u_t.T.contiguous().to(weight.dtype)
    eigenvalues, vectors = torch.linalg.eigh(w.T @ w)  # ascending
    scale = eigenvalues[-rank:].flip(0).clamp_min(torch.finfo(torch.float64).tiny).pow(0.25)  # sqrt of singular values
    vectors = vectors[:, -rank:].flip(1)
    # U sqrt(S) = W V S^-1 sqrt(S) = W V / sqrt(S)
    return (vectors * scale).T.contiguous().to(weight.dtype), ((w @ vectors) / scale).to(weight.dtype)


def project(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (v [R, N], u [M, R]) nearest to a dense weight [M, N] in the Frobenius norm: its truncated SVD."""
    return truncated_svd(weight, rank)
