"""The orthogonal factor of matrices by matrix products alone. Source: Keller Jordan et al. 2024 (Muon)."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial a x + b x^3 + c x^5
SMALLEST_NORM = 1e-12  # a matrix below it is not brought to norm 1; zeros stay zeros


@torch.no_grad()
def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Map every matrix U S V^T of [..., m, n] to about U V^T, in `dtype`; a new tensor.

    Each step applies the polynomial to the singular values, of which the largest are at most 1 at first. After five
    steps those above 1/100 of the matrix's Frobenius norm lie between 0.68 and 1.14; smaller ones are raised at least
    a hundredfold, or to that range. In every entry the result is that of exact arithmetic up to 2e-5 in fp32 and up to
    0.2 in bf16.
    """
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(SMALLEST_NORM)
    x = x.to(dtype).flatten(0, -3) if x.ndim > 3 else x.to(dtype).view(-1, *x.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the products with the short side's square cost less
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
