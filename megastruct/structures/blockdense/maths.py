"""BlockDense(B, R): y = U (V_b x), V_b block-diagonal. Source: arXiv 2406.16450, section 2.

Shapes: v [B, R/B, N/B] (block l maps features l*N/B ... of x to features l*R/B ... of the hidden vector), u [M, R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from megastruct.structures.block_product import block_product
from megastruct.structures.orthonormal import orthonormalized
from megastruct.structures.product import autocast_pair, linear
from megastruct.structures.truncation import truncated_svd


def apply(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; v [B, R/B, N/B], u [M, R], bias [M].

    The hidden vector is written in the layout that U reads, and the gradient of x in the layout of x: nothing is
    copied.
    """
    x, v = autocast_pair(x, v)
    hidden = block_product(x, v, shuffled=False, feature_major=False)  # [..., R]
    return linear(hidden, u, bias)


def apply_reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same map written out as sums, block by block and feature by feature."""
    nblocks, rank_per_block, n_per_block = v.shape
    hidden = []
    for block in range(nblocks):
        part = x[..., block * n_per_block : (block + 1) * n_per_block]
        hidden += [(part * v[block, r]).sum(-1) for r in range(rank_per_block)]
    outputs = []
    for m in range(u.shape[0]):
        y = torch.stack([u[m, r] * h for r, h in enumerate(hidden)]).sum(0)
        outputs.append(y if bias is None else y + bias[m])
    return torch.stack(outputs, dim=-1)


def to_dense(v: Tensor, u: Tensor) -> Tensor:
    """The equal dense weight [M, N]."""
    by_block = u.unflatten(1, v.shape[:2]).transpose(0, 1)  # [B, M, R/B]
    return torch.bmm(by_block, v).transpose(0, 1).flatten(1)  # [B, M, N/B] -> [M, N]


def init_factors(v: Tensor, u: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Draws from N(0, std^2) -> their orthonormal factors: of each block of v, and of u as a whole."""
    return orthonormalized(v), orthonormalized(u)


def project(weight: Tensor, nblocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (v [B, R/B, N/B], u [M, R]) nearest to a dense weight [M, N] in the Frobenius norm.

    Block l of v and the columns l*R/B ... of u make up the columns l*N/B ... of the dense equivalent, so each of these
    column blocks is approximated on its own, by its truncated SVD.
    """
    by_block = weight.unflatten(1, (nblocks, -1)).transpose(0, 1)  # [B, M, N/B]
    v, u = truncated_svd(by_block, rank // nblocks)  # [B, R/B, N/B], [B, M, R/B]
    return v, u.transpose(0, 1).flatten(1)
