"""The orthonormal factor of draws, by either way of computing it, against numpy's QR factorisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factors import draw
from megastruct.structures.orthonormal import orthonormalized


@pytest.mark.parametrize("shape", [(7, 7), (30, 20), (40, 20), (300, 20), (20, 300), (3, 12, 5), (2, 3, 5, 6), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_factor_of_a_triangle_with_positive_diagonal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = draw(*shape, seed=1, dtype=dtype)
    found = orthonormalized(weight)
    assert found.shape == weight.shape and found.dtype == dtype
    is_tall = shape[-2] >= shape[-1]
    q, w = (t.double() if is_tall else t.double().mT for t in (found, weight))
    r = q.mT @ w
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        q.mT @ q, torch.eye(q.shape[-1], dtype=torch.float64).expand_as(r), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(r.tril(-1), torch.zeros_like(r), rtol=0, atol=tolerance)
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all()
    expected, triangle = np.linalg.qr(w.numpy())
    expected = expected * np.sign(np.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    np.testing.assert_allclose(q.numpy(), expected, atol=tolerance)
