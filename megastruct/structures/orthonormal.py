"""Random matrices with orthonormal columns, from which all structures start. Source: arXiv 2406.16450, section 4.1."""

from __future__ import annotations

import torch
from torch import Tensor

_TALL = 2  # from this many rows for a column on, a draw is far from singular


def orthonormalized(draw: Tensor) -> Tensor:
    """The orthonormal factor Q of each matrix [..., m, n]: orthonormal columns, or rows where m < n.

    Q R is the one factorisation with a positive diagonal of R. Of independent draws from N(0, std^2), Q has the uniform
    (Haar) distribution, which U V^T of their singular value decomposition has too, at many times the cost. Computed in
    float64, returned in the dtype of `draw`.
    Source: Mezzadri 2007 (arXiv math-ph/0609050), section 5.
    """
    if draw.shape[-2] < draw.shape[-1]:
        return orthonormalized(draw.mT).mT
    q = draw.double()
    if draw.shape[-2] < _TALL * draw.shape[-1]:
        q, r = torch.linalg.qr(q)
        return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).to(draw.dtype)
    # The same by products of matrices, which use all of a processor: R' is the Cholesky factor of the Gram matrix, and
    # the second pass removes the rounding errors of the first. Source: Yamamoto et al. 2015 (ETNA 44), CholeskyQR2.
    for _ in range(2):
        r = torch.linalg.cholesky(q.mT @ q, upper=True)
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
    return q.to(draw.dtype)
