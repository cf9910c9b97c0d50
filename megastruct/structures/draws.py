"""The singular values of a matrix of independent normal draws, without the matrix."""

from __future__ import annotations

from functools import cache
from threading import Lock

import numpy as np

_BISECTIONS = 32  # relative to the largest zero, 2^-32 is well below the precision of float32
_computing = Lock()  # threads that draw layers of one shape side by side need the values at the same time


def singular_values_of_a_draw(m: int, n: int, count: int) -> np.ndarray:
    """The `count` largest singular values of a matrix [m, n] of draws from N(0, 1), in descending order: float64.

    They are the square roots of the zeros of the Laguerre polynomial of degree n and parameter m - n (m >= n), around
    which those of draws scatter. The sum of all their squares is m n, the mean of a draw's.
    The zeros are the eigenvalues of a tridiagonal matrix, found by bisection with counts of the eigenvalues below a
    point, at a cost that grows with n `count`; once for each shape.
    Sources: Dumitriu and Edelman 2005 (arXiv math-ph/0403029); Givens 1954.
    """
    with _computing:
        return _computed(max(m, n), min(m, n), count)


@cache
def _computed(m: int, n: int, count: int) -> np.ndarray:
    k = np.arange(n, dtype=np.float64)
    diagonal, squares = 2 * k + m - n + 1, k * (k + m - n)  # squares[k]: of the entry between k - 1 and k
    low, high = np.zeros(count), np.full(count, diagonal[-1] + 2 * np.sqrt(squares[-1]) + 1)
    wanted = n - np.arange(count)  # so many zeros are at most the one that is looked for
    with np.errstate(divide="ignore"):
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            pivots, below = np.full(count, np.inf), np.zeros(count, dtype=np.int64)
            for entry, square in zip(diagonal, squares, strict=True):
                pivots = entry - middle - square / pivots
                below += pivots < 0
            enough = below >= wanted
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.sqrt((low + high) / 2)
