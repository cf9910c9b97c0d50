"""The nearest orthonormal matrix, from which the block structures start. Source: arXiv 2406.16450, section 4.1."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_orthonormal(weight: Tensor) -> Tensor:
    """U V^T of the thin SVD U S V^T of each matrix [..., m, n]: orthonormal columns, or rows where m < n.

    Computed in float64, returned in the dtype of `weight`.
    """
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (left @ right).to(weight.dtype)
