"""The norm of a factor, and of its updates, at which the size of activations does not depend on the width.

A matrix d_in -> d_out scales its input by the same factor at every width if its spectral norm is sqrt(d_out / d_in).
The same holds for its updates. A structured matrix is a product of such matrices, block by block, each with its own
d_in and d_out. Factors are [..., d_out, d_in].
Sources: Qiu et al. 2024 (arXiv 2406.06248), section 3; Yang et al. 2023 (arXiv 2310.17813).
"""

from __future__ import annotations

import math

from torch import Tensor


def spectral_scale(factor: Tensor) -> float:
    """The spectral norm sqrt(d_out / d_in) that a factor [..., d_out, d_in] should have."""
    d_out, d_in = factor.shape[-2:]
    return math.sqrt(d_out / d_in)


def spectral_std(factor: Tensor) -> float:
    """Standard deviation of independent entries that gives this norm, up to a constant."""
    d_out, d_in = factor.shape[-2:]
    return math.sqrt(min(1.0, d_out / d_in) / d_in)
