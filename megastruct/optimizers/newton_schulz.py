"""The orthogonal factor of matrices by matrix products alone. Source: Keller Jordan et al. 2024 (Muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megastruct.optimizers.coefficients import Polynomial
from megastruct.optimizers.record import Precision

SMALLEST_NORM = 1e-12  # a matrix below it is not brought to norm 1; zeros stay zeros


def working_dtype(device_type: str, precision: Precision) -> torch.dtype:
    """What Newton-Schulz works in: the training's precision on GPUs, fp32 on CPUs, where bf16 would save nothing.

    In bf16 the result depends on the order of sums, and so on the layout, far more than an fp32 run's gradients do.
    """
    return torch.bfloat16 if device_type == "cuda" and precision == "bf16" else torch.float32


@torch.no_grad()
def newton_schulz(matrices: Tensor, polynomials: Sequence[Polynomial], dtype: torch.dtype) -> Tensor:
    """Map every matrix U S V^T of [..., m, n] to about U V^T, in `dtype`; a new tensor.

    Each step applies its polynomial to the singular values, of which the largest are at most 1 at first. What comes out
    of several steps, and how exactly, is in docs/optimizers.md and docs/tolerances.md.
    """
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(SMALLEST_NORM)
    x = x.to(dtype).flatten(0, -3) if x.ndim > 3 else x.to(dtype).view(-1, *x.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the products with the short side's square cost less
    for a, b, c in polynomials:
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
