"""BlockShuffle(B), also called Monarch: y = f^-1(U_b f(V_b x)). Source: arXiv 2406.16450, section 2.

Both factors are block-diagonal; the shuffle f between them lets every output depend on every input. With the inner
width K = min(N, M): v [B, K/B, N/B], u [B, M/B, K/B]. f reads feature r*B + l as block l, position r; f^-1 writes
block l, position s to feature s*B + l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megastruct.structures.block_product import block_product
from megastruct.structures.orthonormal import orthonormalized
from megastruct.structures.product import autocast_pair
from megastruct.structures.truncation import truncated_svd


def apply(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; v [B, K/B, N/B], u [B, M/B, K/B], bias [M].

    Hidden vector and output are feature-major, where both shuffles are strides (see `block_product.py`), so the forward
    copies nothing. The output is [..., M] with the strides of its transpose; element-wise functions keep them, and a
    second map of this kind reads them as they are. Backward, a gradient that arrives token-major is transposed once.
    """
    x, v = autocast_pair(x, v)
    hidden = block_product(x, v, shuffled=False, feature_major=True)  # [..., K]
    y = block_product(hidden, u.to(hidden.dtype), shuffled=True, feature_major=True)  # [..., M]
    return y if bias is None else y + bias.to(y.dtype)


def apply_reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same map written out as sums and as the two shuffles of single features."""
    nblocks, k_per_block, n_per_block = v.shape
    m_per_block = u.shape[1]
    hidden = []
    for block in range(nblocks):
        part = x[..., block * n_per_block : (block + 1) * n_per_block]
        hidden += [(part * v[block, r]).sum(-1) for r in range(k_per_block)]
    outputs = {}
    for block in range(nblocks):
        shuffled = [hidden[r * nblocks + block] for r in range(k_per_block)]
        for s in range(m_per_block):
            y = torch.stack([u[block, s, r] * h for r, h in enumerate(shuffled)]).sum(0)
            outputs[s * nblocks + block] = y
    y = torch.stack([outputs[m] for m in range(nblocks * m_per_block)], dim=-1)
    return y if bias is None else y + bias


def to_dense(v: Tensor, u: Tensor) -> Tensor:
    """The equal dense weight [M, N]."""
    nblocks, n = len(v), v.shape[0] * v.shape[2]
    first = torch.block_diag(*v).unflatten(0, (-1, nblocks)).transpose(0, 1)  # f on [K, N] -> [B, K/B, N]
    return torch.bmm(u, first).transpose(0, 1).reshape(-1, n)  # f^-1 on [B, M/B, N] -> [M, N]


def init_factors(v: Tensor, u: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Draws from N(0, std^2) -> the orthonormal factor of each block."""
    return orthonormalized(v), orthonormalized(u)


def project(weight: Tensor, nblocks: int) -> tuple[Tensor, Tensor]:
    """The factors (v [B, K/B, N/B], u [B, M/B, K/B]) nearest to a dense weight [M, N] in the Frobenius norm.

    Hidden feature j is row j % (K/B) of block j // (K/B) of v, and column j // B of block j % B of u. So it adds a
    matrix of rank 1 to the submatrix of these two blocks (outputs j % B, B + j % B, ..., and the inputs of the block of
    v), and to no other. About K/B^2 features meet in each submatrix, which gets its truncated SVD of that rank.
    Source: Dao et al. 2022 (arXiv 2204.00595), section 3.3, for blocks of any shape.
    """
    m, n = weight.shape
    k_per_block = min(m, n) // nblocks
    feature = torch.arange(nblocks * k_per_block, device=weight.device)
    block_u, column = feature % nblocks, feature // nblocks
    block_v, row = feature // k_per_block, feature % k_per_block
    first = (block_v * k_per_block - block_u + nblocks - 1) // nblocks  # the first column with a feature of block_v
    place = column - first  # of the feature among those of its submatrix
    blocks = weight.unflatten(0, (-1, nblocks)).unflatten(2, (nblocks, -1)).permute(1, 2, 0, 3)  # [B, B, M/B, N/B]
    right, left = truncated_svd(blocks, int(place.max()) + 1)  # [B, B, C, N/B], [B, B, M/B, C]
    v, u = weight.new_empty(nblocks, k_per_block, n // nblocks), weight.new_empty(nblocks, m // nblocks, k_per_block)
    v[block_v, row] = right[block_u, block_v, place]
    u[block_u, :, column] = left[block_u, block_v, :, place]
    return v, u
