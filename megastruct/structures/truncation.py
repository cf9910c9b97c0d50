"""The best approximation of a matrix by one of lower rank, from which structures project dense weights."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation u v of each matrix [..., m, n] -> (v [..., R, n], u [..., m, R]).

    With the singular values S it is v = sqrt(S) V^T and u = U sqrt(S), so that both factors have the same scale, as the
    initial factors of LowRank have. Computed in float64 from the eigenvectors of the smaller Gram matrix, which is many
    times faster than a full SVD; returned in the dtype of `weight`. Rank that the matrix lacks gives zeros.
    Source: Eckart and Young 1936.
    """
    w = weight.double()
    if w.shape[-2] < w.shape[-1]:
        u, v = truncated_svd(w.mT, rank)
        return v.mT.contiguous().to(weight.dtype), u.mT.contiguous().to(weight.dtype)
    _, vectors = torch.linalg.eigh(w.mT @ w)  # of ascending eigenvalues
    right = vectors[..., -rank:].flip(-1)  # [..., n, R]
    left = w @ right  # U S: the norms of its columns are the singular values, also where their squares would round off
    scale = left.norm(dim=-2, keepdim=True).sqrt()  # [..., 1, R]
    scale = torch.where(scale > 0, scale, 1.0)
    return (right * scale).mT.contiguous().to(weight.dtype), (left / scale).to(weight.dtype)
